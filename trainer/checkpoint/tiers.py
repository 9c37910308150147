"""Two places for a run's checkpoints: the shared one of the run, and a faster one on this node for those in between.

    runs/<run>/checkpoints/step-00000500/        `checkpoint.every_*`: kept as `keep_*` say
    <checkpoint.local_dir>/<run>/step-00000540/  `checkpoint.local_every_n_steps`: the newest `local_keep_last`

A job that goes on takes the newest good one of both. On another node there is only the shared one. Imports no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.checkpoint.store import Checkpoint, CheckpointStore


def local_folder(local_dir: str | None, run_name: str) -> Path | None:
    """Where the local checkpoints of the run `<name>-<id>` are; None without `checkpoint.local_dir`."""
    return None if local_dir is None else Path(local_dir).expanduser().absolute() / run_name


def newest_good(
    shared: CheckpointStore, local: CheckpointStore | None, events: Iterable[dict[str, Any]]
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of both whose checksums are right, and a message for each that was skipped and set aside.

    `events` of the run tell whether a local one is out of date: see `is_superseded`. Raises UserError as
    `CheckpointStore.newest_good` does.
    """
    found, skipped = shared.newest_good(set_aside=True)
    if local is None:
        return found, skipped
    nearer, also_skipped = local.newest_good(set_aside=True)
    skipped += [f"local {message}" for message in also_skipped]
    if nearer is None or (found is not None and nearer.step <= found.step):
        return found, skipped
    return (found if is_superseded(nearer, events) else nearer), skipped


def is_superseded(checkpoint: Checkpoint, events: Iterable[dict[str, Any]]) -> bool:
    """Whether an attempt has begun since from an earlier step (on another node, which did not see this checkpoint):
    it took the metrics back to there, and what it logged afterwards may end before this checkpoint's step."""
    return any(
        event["event"] == "started" and event["time"] > checkpoint.time and event.get("step", 0) < checkpoint.step
        for event in events
    )


def remove_local(local: CheckpointStore | None) -> None:
    """At the end of a run: its last checkpoint is in the shared place."""
    if local is not None:
        shutil.rmtree(local.directory, ignore_errors=True)
