"""`trainer check --deep`: what only the data plane can tell, asked of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.cli.job import Job
from trainer.config.problems import raise_all
from trainer.config.sources import source_folder
from trainer.core.errors import TrainerError, UserError
from trainer.supervise import entry

TIMEOUT_S = 1800.0
"""Preparing the data, tokens of many files for one, may be most of it."""


def counted(jobs: list[Job]) -> list[dict[str, Any]]:
    """`trainer.train.deep.Facts` of each job, `error` taken out. Raises what is wrong with any of them."""
    asked = [{"config": job.config, "with_data": _with_data(job.composed.overrides)} for job in jobs]
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # The user's own modules, from where the prompt finds them.
    paths = [os.getcwd(), source_folder(Path.cwd()), outside.get("PYTHONPATH")]
    outside["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    try:
        done = subprocess.run(
            [sys.executable, *entry.started(entry.DEEP)],
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONHASHSEED": "0", **outside, "CUDA_VISIBLE_DEVICES": ""},
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrainerError(
            f"--deep took more than {TIMEOUT_S:g} s", "leave --deep out; the run itself has no such limit"
        ) from None
    if done.returncode != 0:
        raise TrainerError(f"--deep ended with exit code {done.returncode}", "what it printed above says why")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    raise_all([UserError(**one["error"]) for one in found if one["error"]])
    return [{key: value for key, value in one.items() if key != "error"} for one in found]


def described(found: dict[str, Any]) -> list[tuple[str, str]]:
    """As lines of the plan."""
    count, learns = found["parameters"], found["trainable"]
    lines = [("parameters", f"{count:,}" + ("" if learns == count else f", {learns:,} of them trained"))]
    if not count and found["not_counted"]:
        lines = []
    if found["not_counted"]:
        return [*lines, ("operations", f"not counted: {found['not_counted']}")]
    forward, training, tokens = found["forward_flops"], found["training_flops"], found["tokens"]
    of = f"a token, in samples of {tokens:,}" if tokens else "a sample"
    each = f"forward {_giga(forward / (tokens or 1))}, training {_giga(training / (tokens or 1))} {of}"
    at = ", ".join(f"{key} {value}" for key, value in (found["at"] or {}).items())
    return [*lines, ("operations", each), *([("counted at", at)] if at else [])]


def _giga(operations: float) -> str:
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if operations >= size:
            return f"{operations / size:.4g} {unit}"
    return f"{operations / 1e3:.4g} kFLOP"


def _with_data(overrides: list[str]) -> bool:
    """Whether the job's data is to be looked at: not where only a model is named, which is counted as published."""
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    data = any(name in ("data", "experiment") or name.startswith("data.") for name in names)
    return data or "model" not in names
