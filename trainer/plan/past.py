"""Measurements of past runs for a job: step times on the same hardware, and saves. Imports no torch."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.errors import TrainerError
from trainer.plan.calibration import Kind, Measurement
from trainer.plan.collectives import Traffic
from trainer.plan.work import Work
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved
from trainer.runs.registry import all_runs
from trainer.runs.sampled import sampled_curves, step_seconds

_MOST_RUNS = 50
"""Runs that are read: the newest."""
_LONGEST_S = 1e6
"""Of a step or a save. The runs may be of other people, whose records say anything."""
_SAME = ("model", "data", "task", "optimizer", "strategy", "finetune")
"""Sections that must be equal for a past run to be this job."""


@dataclass(frozen=True)
class Workload:
    """A job that is planned."""

    config: Mapping[str, Any]
    hardware: str
    kind: Kind
    ranks: int
    micro_batch: int
    accumulate: int
    work: Work
    sent: list[Traffic]


@dataclass(frozen=True)
class Save:
    """A measured save of a checkpoint."""

    seconds: float
    bytes: int
    run: str


def same_jobs(runs_dir: Path, job: Workload) -> list[Measurement]:
    """Return the measured step times of past runs of this very job and name, whatever their length, on its hardware."""
    found = []
    for run in _newest(runs_dir):
        if run.name != job.config["name"]:
            continue  # reading a configuration takes milliseconds
        try:
            config = run.config()
            beat = run.heartbeat(0)
            launch = run.launch()
        except (TrainerError, OSError, ValueError):
            continue
        shape = launch.shape
        if shape is None or shape.world_size != job.ranks or beat is None or not _is_same(config, job.config):
            continue
        if beat.device is None or not (
            beat.device.endswith(f", {job.hardware}") if shape.device == "cuda" else launch.host == socket.gethostname()
        ):
            continue
        seconds = step_seconds(sampled_curves(run.metrics_path), job.config["data"].get("batch_size"))
        if seconds is None or not 0 < seconds <= _LONGEST_S:
            continue
        found.append(
            Measurement(
                hardware=job.hardware,
                kind=job.kind,
                ranks=job.ranks,
                micro_batch=job.micro_batch,
                accumulate=job.accumulate,
                work=job.work,
                sent=job.sent,
                step_s=seconds,
                steps=beat.step,
                source=run.path.name,
                time=time.time(),
            )
        )
    return found


def saves(runs_dir: Path) -> list[Save]:
    """Return the measured saves of the newest runs."""
    found = []
    for run in _newest(runs_dir):
        try:
            saved = run.events_of(CheckpointSaved)
        except (TrainerError, OSError):
            continue
        for one in saved:
            seconds = (one.blocked_s or 0.0) + (one.written_s or 0.0)
            if one.written_s is not None and one.bytes and one.bytes > 0 and 0 <= seconds <= _LONGEST_S:
                found.append(Save(seconds, one.bytes, run.path.name))
    return found


def slowest_save(known: list[Save], size: int) -> tuple[float, str] | None:
    """Return the seconds of the slowest save at least a tenth as large, scaled to `size`, and where it was measured."""
    comparable = [one for one in known if one.bytes >= size / 10]
    if not comparable:
        return None
    slowest = max(comparable, key=lambda one: one.seconds * max(1.0, size / one.bytes))
    return slowest.seconds * max(1.0, size / slowest.bytes), slowest.run


def _newest(runs_dir: Path) -> list[RunDirectory]:
    try:
        return all_runs(runs_dir)[-_MOST_RUNS:]
    except TrainerError:
        return []


def _is_same(config: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    if any(config.get(section) != job.get(section) for section in _SAME):
        return False
    return bool(config["trainer"].get("precision") == job["trainer"].get("precision"))
