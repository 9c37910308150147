"""`metrics.jsonl`: every logged scalar, one line per step, rewound on resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only

from trainer.core.files import open_regular, parse_json
from trainer.runs.metrics_lines import OWN_NAMES

_LONGEST_LINE = 1 << 20
APART = "logged/"
"""Prefix of a user's metric with one of those names: `self.log("time", x)` becomes `logged/time`."""


class MetricsFile(Logger):
    """A Lightning logger that writes one JSON object per step: `step`, `epoch`, `time`, then the logged names.

    Lightning counts the steps of training and validation metrics differently (the 50th step's training metrics are
    logged at 49, the validation after it at 50); here both have `completed_steps()`, the steps completed when they were
    measured. The line of a step is held back until the step changes, because its parts come in several calls; what
    comes after a checkpoint made it durable is merged into the line on disk.

    Only `save` waits for the disk (fsync: 2 ms and more): a checkpoint needs the lines up to its step to survive a
    crash of the machine, and those after it would be dropped on resume anyway. Between two saves a line survives the
    end of the process, but not of the machine.

    Args:
        path: The file.
        completed_steps: Returns the completed optimizer steps.
    """

    def __init__(self, path: Path, completed_steps: Callable[[], int]) -> None:
        super().__init__()
        self._path = path
        self._completed_steps = completed_steps
        self._line: dict[str, Any] = {}
        self._written: tuple[int, bytes] | None = None
        """Offset of the current step's line on disk, and its content there."""
        self._descriptor: int | None = None
        """The open file: opening and closing it for each line would take as long as the rest of a logged step."""
        self._unsynced = False
        self._epoch: int | None = None
        self._is_open = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Version of the logger."""
        return "0"

    @property
    def experiment(self) -> DummyExperiment:
        """An object that accepts any call and does nothing, for code that goes through all of `self.loggers`."""
        return DummyExperiment()

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self._path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the line of the current step. `step`, which Lightning gives, is ignored."""
        completed = self._completed_steps()
        if not self._is_open:
            self._continue(completed)
        if self._line and self._line["step"] != completed:
            self._write()
            self._line, self._written = {}, None
        epoch = metrics.get("epoch")
        if type(epoch) is int:  # logged by the Trainer; `self.log("epoch", x)` logs a float
            self._epoch = epoch
        if not self._line:
            self._line = {"step": completed, "epoch": self._epoch, "time": round(time.time(), 3)}
        self._line["epoch"] = self._epoch
        for name, value in metrics.items():
            if name == "epoch" and type(value) is int:
                continue
            number = float(value)
            plain = number if math.isfinite(number) else str(number)  # JSON has no NaN
            self._line[APART + name if name in OWN_NAMES else name] = plain

    def _continue(self, step: int) -> None:
        """Take the line of `step` that an earlier attempt wrote: what is logged before the next step belongs to it."""
        self._is_open = True
        try:
            with open_regular(self._path) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _LONGEST_LINE))
                last = file.read().splitlines(keepends=True)[-1]
            line = parse_json(last.decode())
        except (OSError, ValueError, IndexError):
            return
        if isinstance(line, dict) and line.get("step") == step and last.endswith(b"\n"):
            self._line, self._written = line, (size - len(last), last)
            self._epoch = line.get("epoch")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the config is in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write the line that is held back, or its additions since it was written, and wait for the disk."""
        self._write()
        if self._unsynced and self._descriptor is not None:
            os.fsync(self._descriptor)
            self._unsynced = False

    def _write(self) -> None:
        line = json.dumps(self._line).encode() + b"\n"
        if not self._line or (self._written and self._written[1] == line):
            return
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        size = os.fstat(self._descriptor).st_size
        start = self._written[0] if self._written else size
        os.pwrite(self._descriptor, line, start)
        if start + len(line) < size:
            os.ftruncate(self._descriptor, start + len(line))
        self._written = (start, line)
        self._unsynced = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last line, and close the file."""
        self.save()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def run_folder(trainer: Trainer) -> Path:
    """Return the run directory of a training, which holds metrics.jsonl.

    `trainer.default_root_dir` may be another folder.
    """
    path = next((logger._path for logger in trainer.loggers if isinstance(logger, MetricsFile)), None)
    return Path(trainer.default_root_dir) if path is None else path.parent
