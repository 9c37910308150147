"""`trainer check --deep`: facts that need torch, computed in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from trainer.cli.job import Job
from trainer.config.problems import raise_all
from trainer.config.sources import source_folder
from trainer.core import processes
from trainer.core.errors import TrainerError, UserError
from trainer.supervise import entry

TIMEOUT_S = 1800.0
"""Most of it may be spent on preparing the data, such as tokenizing many files."""


def count(jobs: list[Job]) -> list[dict[str, Any]]:
    """Return the fields of `trainer.train.deep.Facts` for each job, without `error`.

    Raises:
        TrainerError: If the process fails or takes too long.
        UserError: With the errors of all jobs.
    """
    requests = [{"config": job.config, "with_data": names_data(job.composed.overrides)} for job in jobs]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # The user's modules are found in the same folders as by the command line.
    paths = [os.getcwd(), source_folder(Path.cwd()), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    try:
        process = subprocess.run(
            processes.python_module(*entry.started(entry.DEEP)[1:]),
            input=json.dumps(requests),
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONHASHSEED": "0", **environment, "CUDA_VISIBLE_DEVICES": ""},
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrainerError(
            f"--deep took more than {TIMEOUT_S:g} s", "leave --deep out; the run itself has no such limit"
        ) from None
    if process.returncode != 0:
        raise TrainerError(f"--deep ended with exit code {process.returncode}", "see its output above")
    answers: list[dict[str, Any]] = json.loads(process.stdout)
    raise_all([UserError(**one["error"]) for one in answers if one["error"]])
    return [{key: value for key, value in one.items() if key != "error"} for one in answers]


def describe(counted: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the facts as lines of the plan: a title and a text."""
    total, trainable = counted["parameters"], counted["trainable"]
    lines = [("parameters", f"{total:,}" + ("" if trainable == total else f", {trainable:,} of them trainable"))]
    if not total and counted["not_counted"]:
        lines = []
    if counted["not_counted"]:
        return [*lines, ("FLOPs", f"not counted: {counted['not_counted']}")]
    forward, training, tokens = counted["forward_flops"], counted["training_flops"], counted["tokens"]
    unit = f"per token, for sequences of {tokens:,}" if tokens else "per sample"
    flops = f"forward {_flops(forward / (tokens or 1))}, training {_flops(training / (tokens or 1))} {unit}"
    at = ", ".join(f"{key} {value}" for key, value in (counted["at"] or {}).items())
    return [*lines, ("FLOPs", flops), *([("counted at", at)] if at else [])]


def _flops(operations: float) -> str:
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if operations >= size:
            return f"{operations / size:.4g} {unit}"
    return f"{operations / 1e3:.4g} kFLOP"


def names_data(overrides: list[str]) -> bool:
    """Return whether to prepare the job's data: no if only a model is named, which is counted as published."""
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    data = any(name in ("data", "experiment") or (name.startswith("data.") and name not in _SPLIT) for name in names)
    return data or "model" not in names


_SPLIT = ("data.batch_size", "data.micro_batch")
"""Keys of `data` that say nothing about what the data is."""
