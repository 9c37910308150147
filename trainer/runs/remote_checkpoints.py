"""The checkpoints of a run in an object store (`checkpoint.dir`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.store import CheckpointStore
from trainer.runs.directory import RunDirectory

if TYPE_CHECKING:
    from trainer.checkpoint.remote import RemoteStore


def remote_of(run: RunDirectory, url: str | None) -> RemoteStore | None:
    """Open the run's checkpoints below the URL; None without `checkpoint.dir`. Asks the server nothing.

    They are in `<name>-<id>`, by the id that the run was created with, also once the folder is renamed.
    """
    if url is None:
        return None
    from trainer.checkpoint.object_store import ObjectStore
    from trainer.checkpoint.remote import RemoteStore

    name = f"{run.path.name.rpartition('-')[0]}-{run.identity()}"
    return RemoteStore(ObjectStore(f"{url.rstrip('/')}/{name}"), CheckpointStore(run.checkpoints_dir, run.identity()))


def url_of(config: Mapping[str, Any]) -> str | None:
    """Return `checkpoint.dir` of a configuration, which may be damaged."""
    options = config.get("checkpoint")
    url = options.get("dir") if isinstance(options, dict) else None
    return url if isinstance(url, str) else None
