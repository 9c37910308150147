"""Two tiers of checkpoints: the run's shared folder, and a faster node-local folder for more frequent saves.

    runs/<run>/checkpoints/step-00000500/        `checkpoint.every_*`, kept by the rules of `keep_*`
    <checkpoint.local_dir>/<run>/step-00000540/  `checkpoint.local_every_n_steps`, the newest `local_keep_last`

A resume uses the newest intact checkpoint of both tiers. On another node there is only the shared tier. This module
does not import torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from trainer.checkpoint import commit
from trainer.checkpoint.store import Checkpoint, CheckpointStore, Verify
from trainer.core.errors import UserError


def local_folder(local_dir: str | None, run_name: str) -> Path | None:
    """Return the node-local checkpoint folder of the run `<name>-<id>`; None without `checkpoint.local_dir`."""
    return None if local_dir is None else Path(local_dir).expanduser().absolute() / run_name


def own_folder(folder: Path) -> Path:
    """Return the node-local folder, checked: on a disk that all users share, somebody may have made it before.

    Raises:
        UserError: It is a symbolic link, of another user, or others may write to it.
    """
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o002:
        raise UserError(
            f"checkpoint.local_dir: {folder} is not a folder that belongs to you and that only you may write to",
            "remove it, or set checkpoint.local_dir to a folder of your own",
        )
    return folder


def newest_good(
    shared: CheckpointStore,
    local: CheckpointStore | None,
    starts: Iterable[tuple[float, int]],
    verify: Verify = commit.verify,
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint of both tiers whose checksums match, and a message for each that was set aside.

    Args:
        shared: The checkpoints in the run directory.
        local: The node-local checkpoints, if any.
        starts: Time and first step of each attempt; they show whether a local checkpoint is superseded.
        verify: Returns the problems of a checkpoint folder.

    Raises:
        UserError: The newest has a newer format.
    """
    shared_newest, skipped = shared.newest_good(set_aside=True, verify=verify)
    if local is None:
        return shared_newest, skipped
    local_newest, local_skipped = local.newest_good(set_aside=True, verify=verify)
    skipped += [f"local {message}" for message in local_skipped]
    if local_newest is None or (shared_newest is not None and local_newest.step <= shared_newest.step):
        return shared_newest, skipped
    return (shared_newest if is_superseded(local_newest, starts) else local_newest), skipped


def is_superseded(checkpoint: Checkpoint, starts: Iterable[tuple[float, int]]) -> bool:
    """Return whether an attempt has since started from an earlier step, on a node that could not see this checkpoint.

    That attempt rewound the metrics to its own start, and may have ended before this checkpoint's step.

    Args:
        checkpoint: A node-local checkpoint.
        starts: When each attempt started, in seconds since 1970, and from which step.
    """
    return any(started > checkpoint.time and step < checkpoint.step for started, step in starts)


def remove_local(local: CheckpointStore | None) -> None:
    """Delete the node-local checkpoints at the end of a run, whose last checkpoint is in the shared folder."""
    if local is None:
        return
    local.remove_own()
    if local.directory.name.startswith("node-"):
        try:
            local.directory.parent.rmdir()
        except OSError:  # the folder of another node is in it
            pass
