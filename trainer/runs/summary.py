"""What `trainer show --json` says of a run. A key, once there, keeps its meaning; null where not known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint import commit
from trainer.checkpoint.store import BEFORE_END, CheckpointStore, best_of, is_named_as_checkpoint, step_of
from trainer.checkpoint.tiers import local_folder
from trainer.core.records import to_json
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended, Event, Started, Straggler, Tracking
from trainer.runs.ledger import ledger
from trainer.runs.records import BestCheckpoint, HeartbeatRecord, Launch
from trainer.runs.state import state_of

_TAIL_BYTES = 64 * 1024
_TRACKING = ("mode", "source", "project", "url", "dir")
"""What the newest attempt that logged to W&B says of it."""
_NOT_METRICS = ("step", "epoch", "time")


def summary(run: RunDirectory, slurm_states: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Reads a bounded amount: the tail of the metrics, never the whole."""
    state = state_of(run, slurm_states)
    live = run.heartbeat(0)
    launch = run.launch()
    config = run.config()
    events = run.events()
    metrics, last_line = last_metrics(run.metrics_path)
    started = [event.time for event in events if isinstance(event, Started)]
    tracked = next((event for event in reversed(events) if isinstance(event, Tracking)), None)
    attempts = run.attempts()
    saved = checkpoints(run)
    step = live.step if live else last_line.get("step")
    if live and live.phase == "start":  # an attempt that has not chosen its checkpoint yet
        step = max([one["step"] for one in saved if one["committed"]], default=0)
    return {
        "id": run.id,
        "name": run.name,
        "path": str(run.path),
        "state": state.name,
        "reason": state.reason or None,
        "step": step,
        "max_steps": _in(config, "trainer", "max_steps"),
        "epoch": live.epoch if live else last_line.get("epoch"),
        "metrics": metrics,
        "best": to_json(found) if (found := best(run, live)) else None,
        "attempts": 1 + max([end.attempt for end in attempts] + run.logged_attempts(), default=-1),
        "world_size": _world_size(launch, events),
        "strategy": _in(config, "strategy", "name"),
        "cluster": _in(config, "cluster", "name"),
        "wandb_id": ((tracked and tracked.id) or run.id) if _in(config, "tracking", "name") == "wandb" else None,
        "tracking": {name: getattr(tracked, name) for name in _TRACKING} if tracked else None,
        "slurm_job_id": launch.slurm_job_id,
        "checkpoints": saved,
        "created": run.created_at(),
        "started": started[0] if started else None,
        "ended": None if state.is_active else _ended(events, live),
        "ledger": ledger(run, time.time() if state.is_active else None),
        "stragglers": [to_json(event) for event in events if isinstance(event, Straggler)],
        "energy_kwh": None,
        "cost": None,
    }


def best(run: RunDirectory, live: HeartbeatRecord | None) -> BestCheckpoint | None:
    """The best checkpoint on disk, which `--checkpoint best` takes.

    `live` is the first rank's heartbeat: it knows the direction for checkpoints that do not say it themselves, and
    what was best where no checkpoint was validated.
    """
    beat = live.best if live else None
    fallback = beat.mode if beat else "min"
    found = best_of(CheckpointStore(run.checkpoints_dir).committed(), mode=fallback)
    if found is None:
        return beat
    mode = found.mode or fallback
    assert found.monitor_value is not None  # `best_of` looks only at those that have one
    return BestCheckpoint(metric=found.monitor, mode=mode, value=found.monitor_value, step=found.step)


def last_metrics(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The last value of each metric in the tail of `metrics.jsonl`, and its last line."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return {}, {}
    values: dict[str, float] = {}
    last: dict[str, Any] = {}
    for line in lines:
        try:
            last = json.loads(line)
        except ValueError:  # the first may be cut by the seek, the last by a crash
            continue
        values.update({name: value for name, value in last.items() if name not in _NOT_METRICS})
    return values, last


def checkpoints(run: RunDirectory) -> list[dict[str, Any]]:
    """Every checkpoint folder, also one without a COMMIT, by step.

    `verified` is null: sizes were compared, checksums were not; `trainer show --verify` does that.
    """
    found = []
    local = local_folder(run.config().get("checkpoint", {}).get("local_dir"), run.path.name)
    folders = [run.checkpoints_dir] + ([local] if local else [])
    committed = {one.path: one for folder in folders for one in CheckpointStore(folder).committed()}
    paths = [path for folder in folders for path in folder.glob("step-*") if is_named_as_checkpoint(path)]
    for path in sorted(paths, key=lambda path: (step_of(path), not path.name.endswith(BEFORE_END))):
        checkpoint = committed.get(path)
        found.append(
            {
                "step": step_of(path),
                "path": str(path),
                "local": path.parent == local,
                "bytes": checkpoint.bytes if checkpoint else None,
                "committed": commit.is_committed(path),
                "metrics": checkpoint.metrics if checkpoint else None,
                "verified": None,
                "problems": [],
            }
        )
    return found


def _in(config: dict[str, Any], section: str, key: str) -> Any:
    """Null where a damaged configuration has no such section."""
    found = config.get(section)
    return found.get(key) if isinstance(found, dict) else None


def _world_size(launch: Launch, events: list[Event]) -> int | None:
    """Of the newest attempt of this launch, which may have fewer nodes than the run asks for; before it those."""
    begun = [event for event in events if isinstance(event, Started) and event.attempt >= launch.attempt]
    if begun and begun[-1].world_size:
        return begun[-1].world_size
    return launch.shape.world_size if launch.shape else None


def _ended(events: list[Event], live: HeartbeatRecord | None) -> float | None:
    ends = [event.time for event in events if isinstance(event, Ended) and event.event != "hung"]
    return ends[-1] if ends else live.time if live else None
