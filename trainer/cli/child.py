"""A question to a process of its own that may import torch and the user's modules."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TypeVar

from trainer.config.sources import source_folder
from trainer.core import processes, records
from trainer.core.errors import TrainerError
from trainer.core.records import BadRecord
from trainer.supervise import entry

T = TypeVar("T")


def ask(
    kind: str, request: object, answer: type[T], *, count: int, timeout_s: float, what: str, shorten: str
) -> list[T]:
    """Start the process, give it the request as JSON and return its answers.

    Args:
        kind: Name of the process in `trainer.supervise.entry`.
        request: The record that it reads, or a list of them.
        answer: The class of an answer.
        count: Number of answers.
        timeout_s: Seconds until it is given up.
        what: Its name in messages.
        shorten: What to do if it takes too long.

    Raises:
        TrainerError: If the process fails, takes too long or answers something else.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # The user's modules are found in the same folders as by the command line.
    paths = [os.getcwd(), source_folder(Path.cwd()), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    try:
        done = subprocess.run(
            processes.python_module(*entry.started(kind)[1:]),
            input=records.dumps(request),
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
    try:
        answers: list[T] = records.loads(list[answer], done.stdout, f"the answer of {what}")  # type: ignore[valid-type]
    except BadRecord as error:
        raise TrainerError(error.message, "see its output above") from None
    if len(answers) != count:
        raise TrainerError(f"{what} gave {len(answers)} answers to {count} questions", "see its output above")
    return answers
