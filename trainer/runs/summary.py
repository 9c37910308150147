"""Summarize a run for `trainer show --json` and `trainer ls`.

Published keys keep their meaning; unknown values are null.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint import commit, node_record, remote_record
from trainer.checkpoint.node_disk import folder_of
from trainer.checkpoint.store import BEFORE_END, Checkpoint, CheckpointStore, best_of, is_named_as_checkpoint, step_of
from trainer.checkpoint.tiers import local_folder
from trainer.core.errors import UserError
from trainer.core.files import parse_json, read_bytes
from trainer.core.records import read_or_skip, to_json
from trainer.runs.bill import bill
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended, Event, Started, Straggler, Tracking, WandbEnvironment
from trainer.runs.ledger import ledger
from trainer.runs.metrics_lines import OWN_NAMES
from trainer.runs.records import BestCheckpoint, Evaluation, HeartbeatRecord, Launch
from trainer.runs.state import State, state_of

_TAIL_BYTES = 64 * 1024
_TRACKING = ("mode", "source", "project", "url", "dir")
"""Fields of the event `tracking` of the newest attempt that logged to W&B."""
_LARGEST = sys.float_info.max


def summary(run: RunDirectory, slurm_states: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return everything that is known about a run.

    Reads a bounded amount of data: only the tail of the metrics.

    Args:
        run: The run.
        slurm_states: As in `state_of`.
    """
    return summary_in_state(run, state_of(run, slurm_states), run.config())


def summary_in_state(run: RunDirectory, state: State, config: dict[str, Any]) -> dict[str, Any]:
    """Return everything that is known about a run whose state and configuration are known."""
    live = run.heartbeat(0)
    launch = run.launch()
    events = run.events()
    metrics, last_line = last_metrics(run.metrics_path)
    started = [event.time for event in events if isinstance(event, Started)]
    tracked = next((event for event in reversed(events) if isinstance(event, Tracking)), None)
    attempts = run.attempts()
    saved, best_checkpoint = checkpoints(run, config), best(run, live)
    charged = bill(run, config)
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
        "max_steps": _option(config, "trainer", "max_steps"),
        "epoch": live.epoch if live else last_line.get("epoch"),
        "metrics": metrics,
        "best": to_json(best_checkpoint) if best_checkpoint else None,
        "attempts": 1 + max([end.attempt for end in attempts] + run.logged_attempts(), default=-1),
        "world_size": _world_size(launch, events),
        "strategy": _option(config, "strategy", "name"),
        "cluster": _option(config, "cluster", "name"),
        "wandb_id": _wandb_id(run, events) if _option(config, "tracking", "name") == "wandb" else None,
        "wandb": to_json(wandb) if (wandb := run.wandb()) else None,
        "tracking": {name: getattr(tracked, name) for name in _TRACKING} if tracked else None,
        "slurm_job_id": launch.slurm_job_id,
        "sweep": _sweep(run),
        "checkpoints": saved,
        "evaluations": evaluations(run),
        "tags": _tags(config),
        "created": run.created_at(),
        "started": started[0] if started else None,
        "ended": None if state.is_active else _ended(events, live),
        "ledger": ledger(run, time.time() if state.is_active else None),
        "stragglers": [to_json(event) for event in events if isinstance(event, Straggler)],
        "energy_kwh": charged.total.energy_kwh,
        "cost": charged.total.cost,
        "bill": charged.as_dict(),
    }


def best(run: RunDirectory, live: HeartbeatRecord | None) -> BestCheckpoint | None:
    """Return the best checkpoint on disk, which `--checkpoint best` uses.

    Args:
        run: The run.
        live: The heartbeat of rank 0. Supplies the metric's direction for checkpoints that do not store it, and the
            best checkpoint if none on disk was validated.
    """
    beat = live.best if live else None
    fallback = beat.mode if beat else "min"
    uploaded = remote_record.read(run.checkpoints_dir)
    checkpoint = best_of([*(one for one, _ in uploaded.values()), *_committed(run.checkpoints_dir)], mode=fallback)
    if checkpoint is None:
        return beat
    mode, value = checkpoint.mode or fallback, checkpoint.monitor_value
    assert value is not None  # `best_of` ranks only those that have one
    return BestCheckpoint(metric=checkpoint.monitor, mode=mode, value=value, step=checkpoint.step)


def last_metrics(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the last value of each metric in the tail of `metrics.jsonl`, and its last line."""
    try:
        lines = read_bytes(path, _TAIL_BYTES, end=True).decode(errors="replace").split("\n")
    except OSError:
        return {}, {}
    values: dict[str, float] = {}
    last: dict[str, Any] = {}
    for line in lines:
        try:
            parsed = parse_json(line)
        except ValueError:  # the first line may be cut by the limit of the tail, the last by a crash
            continue
        if not isinstance(parsed, dict):
            continue
        last = parsed
        values.update({name: value for name, value in last.items() if name not in OWN_NAMES and _is_metric(value)})
    return values, {name: value for name, value in last.items() if _is_metric(value)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_metric(value: Any) -> bool:
    """Return whether a value is a number that can be shown, or one of the names for those that JSON does not have."""
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    return type(value) in (int, float) and not abs(value) > _LARGEST


def evaluations(run: RunDirectory) -> list[dict[str, Any]]:
    """Return what `trainer evaluate` has measured: step, split and metrics of each, sorted by step."""
    found = []
    for path in sorted(run.evaluations_dir.glob("step-*.json")):
        record = read_or_skip(Evaluation, path)
        if record is not None:
            metrics = {name: _plain(value) for name, value in record.metrics.items() if _is_metric(value)}
            found.append({"step": record.step, "split": record.split, "metrics": metrics})
    return sorted(found, key=lambda one: one["step"])


def local_checkpoints(run: RunDirectory, config: Mapping[str, Any]) -> Path | None:
    """Return the folder of this node's own checkpoints of a run; None without `checkpoint.local_dir`."""
    local_dir = _option(config, "checkpoint", "local_dir")
    try:
        return local_folder(local_dir, run.path.name) if isinstance(local_dir, str) else None
    except RuntimeError:  # the home directory of an unknown user
        return None


def checkpoints(run: RunDirectory, config: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return every checkpoint folder, including those without COMMIT, sorted by step, and those that are elsewhere.

    `verified` is null because only sizes were compared; `trainer show --verify` compares checksums. `remote` is where a
    checkpoint is in the object store, `nodes` are those on whose disks it has parts, both as the run has recorded it.
    """
    rows = []
    config = run.config() if config is None else config
    local = local_checkpoints(run, config)
    uploaded = remote_record.read(run.checkpoints_dir)
    folders = [run.checkpoints_dir] + ([local] if local else [])
    committed = {one.path: one for folder in folders for one in _committed(folder)}
    paths = [path for folder in folders for path in folder.glob("step-*") if is_named_as_checkpoint(path)]
    paths += [path for path in uploaded if path not in paths]
    for path in sorted(paths, key=lambda path: (step_of(path), not path.name.endswith(BEFORE_END))):
        in_store, url = uploaded.get(path, (None, None))
        checkpoint = committed.get(path) or in_store
        rows.append(
            {
                "step": step_of(path),
                "path": str(path),
                "local": path.parent == local,
                "bytes": checkpoint.bytes if checkpoint else None,
                "here": path.is_dir(),
                "remote": url,
                "nodes": [],
                "committed": commit.is_committed(path) if path.is_dir() else checkpoint is not None,
                "metrics": checkpoint.metrics if checkpoint else None,
                "verified": None,
                "problems": [],
            }
        )
    rows += _on_nodes(node_record.read(run.checkpoints_dir), local) if local else []
    return sorted(rows, key=lambda row: row["step"])


def _on_nodes(held: Mapping[str, list[tuple[int, str]]], local: Path) -> list[dict[str, Any]]:
    """Return the checkpoints on the disks of several nodes; the parts that this machine sees are looked at."""
    rows = []
    for name, nodes in held.items():
        parts = [folder_of(local, node) / name for node, _ in nodes]
        here = [path for path in parts if path.is_dir()]
        rows.append(
            {
                "step": step_of(Path(name)),
                "path": str([*here, *parts, local / name][0]),
                "local": True,
                "bytes": None,
                "here": bool(here),
                "remote": None,
                "nodes": [{"node": node, "host": host} for node, host in nodes],
                "committed": bool(nodes) and all(map(commit.is_committed, here)),
                "metrics": None,
                "verified": None,
                "problems": [],
            }
        )
    return rows


def _committed(folder: Path) -> list[Checkpoint]:
    """Return the committed checkpoints; none of a folder that may not be read."""
    try:
        return CheckpointStore(folder).committed()
    except OSError:
        return []


def _sweep(run: RunDirectory) -> str | None:
    """Return the name of the sweep that made the run; None for any other run."""
    try:
        sweep = run.manifest().get("sweep")
    except (UserError, AttributeError):  # damaged
        return None
    name = sweep.get("name") if isinstance(sweep, dict) else None
    return name if isinstance(name, str) else None


def _tags(config: Mapping[str, Any]) -> list[str]:
    options = config.get("tracking")
    tags = options.get("tags") if isinstance(options, dict) else None
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _option(config: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a value of the configuration; None if a damaged configuration lacks the section, or has more there."""
    options = config.get(section)
    value = options.get(key) if isinstance(options, dict) else None
    return value if isinstance(value, (str, int, float)) else None


def _wandb_id(run: RunDirectory, events: list[Event]) -> str:
    """Return the id of the W&B run: the recorded one, that of the sweep that launched the run, or that of the run."""
    recorded = run.wandb()
    if recorded is not None:
        return recorded.id
    ids = [event.id for event in events if isinstance(event, Tracking)]
    ids += [event.run_id for event in events if isinstance(event, WandbEnvironment)]
    return next(filter(None, ids), run.id)


def _world_size(launch: Launch, events: list[Event]) -> int | None:
    """Return the world size of the newest attempt (`min_nodes` allows fewer nodes), else of the launch shape."""
    begun = [event for event in events if isinstance(event, Started) and event.attempt >= launch.attempt]
    if begun and begun[-1].world_size:
        return begun[-1].world_size
    return launch.shape.world_size if launch.shape else None


def _ended(events: list[Event], live: HeartbeatRecord | None) -> float | None:
    ends = [event.time for event in events if isinstance(event, Ended) and event.event != "hung"]
    return ends[-1] if ends else live.time if live else None
