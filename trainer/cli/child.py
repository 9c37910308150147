"""A question to a process of its own that may import torch and the user's modules."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from trainer.config.sources import source_folder
from trainer.core import processes
from trainer.core.errors import TrainerError
from trainer.supervise import entry


def ask(kind: str, request: Any, timeout_s: float, what: str, shorten: str) -> list[dict[str, Any]]:
    """Start the process, give it the request as JSON and return its answers.

    Args:
        kind: Name of the process in `trainer.supervise.entry`.
        request: What it reads, plain values only.
        timeout_s: Seconds until it is given up.
        what: Its name in messages.
        shorten: What to do if it takes too long.

    Raises:
        TrainerError: If the process fails or takes too long.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # The user's modules are found in the same folders as by the command line.
    paths = [os.getcwd(), source_folder(Path.cwd()), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    try:
        done = subprocess.run(
            processes.python_module(*entry.started(kind)[1:]),
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONHASHSEED": "0", **environment, "CUDA_VISIBLE_DEVICES": ""},
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrainerError(f"{what} took more than {timeout_s:g} s", shorten) from None
    if done.returncode != 0:
        raise TrainerError(f"{what} ended with exit code {done.returncode}", "see its output above")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers
