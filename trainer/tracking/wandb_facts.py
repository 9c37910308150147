"""Facts that are logged to the W&B run besides the configuration: machine, command, versions, extremes of metrics."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.direction import direction_of
from trainer.core.errors import UserError
from trainer.core.files import read_json, read_text
from trainer.core.secrets import mask_inside
from trainer.runs.directory import RunDirectory
from trainer.runs.metrics_lines import OWN_NAMES, lines_after
from trainer.runs.records import BestCheckpoint
from trainer.tracking.wandb_rows import AXIS

KEY = "about"
"""The key of the facts in the config of the W&B run."""
_SLURM = {
    "slurm_job_id": "SLURM_JOB_ID",
    "slurm_array_job_id": "SLURM_ARRAY_JOB_ID",
    "slurm_array_task_id": "SLURM_ARRAY_TASK_ID",
    "slurm_cluster": "SLURM_CLUSTER_NAME",
    "slurm_partition": "SLURM_JOB_PARTITION",
    "slurm_nodes": "SLURM_JOB_NODELIST",
    "slurm_restarts": "SLURM_RESTART_COUNT",
}
_CODE = ("commit", "dirty")


def command_of(run: RunDirectory) -> list[str]:
    """Return the command as it was typed, one argument each, with secrets masked."""
    try:
        overrides = shlex.split(read_text(run.overrides_path))
    except (OSError, ValueError):
        overrides = []
    return ["trainer", "fit", *(mask_inside(override) for override in overrides)]


def facts_of(run: RunDirectory, world_size: int | None = None) -> dict[str, Any]:
    """Return the facts that are known at the start of an attempt. What is not known is left out.

    Args:
        run: The run directory.
        world_size: Number of ranks.
    """
    manifest = _manifest(run)
    code, machine = _mapping(manifest.get("code")), _mapping(manifest.get("machine"))
    facts = {
        "run": run.path.name,
        "path": str(run.path),
        "command": shlex.join(command_of(run)),
        "overrides": command_of(run)[2:],
        "choices": manifest.get("choices"),
        "parent": _mapping(manifest.get("reproduces")).get("path"),
        "world_size": world_size,
        "user": manifest.get("user"),
        "host": os.uname().nodename,
        "python": manifest.get("python"),
        "packages": {name: version for name, version in _mapping(manifest.get("packages")).items() if version},
        "cpu": machine.get("cpu"),
        "cores": machine.get("cores"),
        "gpus": machine.get("gpus"),
        **{name: code.get(name) for name in _CODE},
        **{name: os.environ.get(variable) for name, variable in _SLURM.items()},
        "plan": _plan(run),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _plan(run: RunDirectory) -> Any:
    """Return `plan.json`, which the command line may have written before the launch."""
    try:
        return read_json(run.plan_path)
    except UserError:
        return None


def _manifest(run: RunDirectory) -> Mapping[str, Any]:
    try:
        return _mapping(run.manifest())
    except UserError:  # damaged
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


class Extremes:
    """The minimum and maximum of each metric over all attempts, for the summary of the W&B run."""

    def __init__(self, metrics_path: Path) -> None:
        self._range: dict[str, tuple[float, float]] = {}
        for line in lines_after(metrics_path, -1):
            self.add(line)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add logged values; what is not a finite number is left out."""
        for name, value in metrics.items():
            if name in OWN_NAMES or name == AXIS or isinstance(value, (str, bool)):
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):  # an image, a table
                continue
            if math.isfinite(number):
                low, high = self._range.get(name, (number, number))
                self._range[name] = min(low, number), max(high, number)

    def summary(self, best: BestCheckpoint | None) -> dict[str, float]:
        """Return `min/NAME`, `max/NAME` and, where it is known which is better, `best/NAME` of each metric.

        Args:
            best: The best checkpoint, which adds `best/step`; its value is that of the monitored metric.
        """
        values = {f"min/{name}": low for name, (low, _) in self._range.items()}
        values |= {f"max/{name}": high for name, (_, high) in self._range.items()}
        for name, extremes in self._range.items():
            if (direction := direction_of(name)) is not None:
                values[f"best/{name}"] = extremes[direction == "max"]
        if best is not None and best.metric:
            values |= {f"best/{best.metric}": best.value, "best/step": best.step}
        return values
