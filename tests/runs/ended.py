"""Runs that ended some time ago, for tests of what is sealed and listed."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.commit import CommitInfo, Staging, write_checkpoint
from trainer.core.files import append_line, write_atomic
from trainer.runs import seal
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended, Started
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Launch, Outcome

GONE = 2**30
"""A process id that Linux does not use."""
HOUR_S = 3600.0


def ended_run(
    root: Path, name: str = "job", outcome: Outcome | None = "finished", *, config: dict[str, Any] | None = None,
    accuracies: tuple[float, ...] = (0.5, 0.9, 0.7), job: str | None = None,
) -> RunDirectory:  # fmt: skip
    """A run on this machine that ended an hour ago, after a step and a checkpoint per accuracy."""
    run = RunDirectory.new(root, name)
    sections = {"strategy": {"name": "ddp"}, "cluster": {"name": "local"}, "tracking": {"name": "none", "tags": ["a"]}}
    run.config_path.write_text(
        yaml.safe_dump({"name": name, **sections, "trainer": {"max_steps": 3}, **(config or {})})
    )
    run.manifest_path.write_text(json.dumps({"schema_version": 1, "choices": {"model": "mlp"}}))
    run.write_launch(Launch(cluster="local", host=socket.gethostname(), pid=GONE, pid_started=1, slurm_job_id=job))
    run.attempt_logs(0).mkdir(parents=True)
    run.add_event(Started(attempt=0, step=0, world_size=1))
    for step, accuracy in enumerate(accuracies, start=1):
        line = {"step": step, "epoch": 0, "time": 1.0, "val/acc": accuracy, "loss": 1 / step}
        append_line(run.metrics_path, json.dumps(line))
        monitored = {"monitor": "val/acc", "monitor_value": accuracy, "monitor_mode": "max"}
        info = CommitInfo(step, metrics={"val/acc": accuracy}, **monitored)
        write_checkpoint(run.checkpoints_dir / f"step-{step:08d}", 0, info, 3, _write_state)
    run.write_heartbeat(0, HeartbeatRecord(time=time.time() - HOUR_S, phase="finished", step=len(accuracies)))
    if outcome is not None:
        run.write_outcome(AttemptOutcome(attempt=0, outcome=outcome, step=len(accuracies)))
        if outcome in ("finished", "stopped", "failed"):
            run.add_event(Ended(event=outcome, attempt=0, step=len(accuracies)))
    make_old(run)
    return run


def _write_state(staging: Staging) -> None:
    with staging.file("state.pt") as file:
        file.write(b"abc")


def make_old(run: RunDirectory, seconds: float = HOUR_S) -> None:
    """Give what a summary is derived from the times of an hour ago, as if nobody had changed it since."""
    for name in seal.SOURCES:
        if (run.path / name).exists():
            os.utime(run.path / name, (time.time() - seconds, time.time() - seconds))


def rewrite(path: Path, old: str, new: str) -> None:
    """Replace text in a file, atomically."""
    text = path.read_text()
    assert old in text
    write_atomic(path, text.replace(old, new))
