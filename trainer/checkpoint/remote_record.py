"""What the object store of a run holds, as the last attempt left it: `checkpoints/remote.json`.

For commands that must not ask the network. What a resume uses is read from the store itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.store import Checkpoint, is_named_as_checkpoint
from trainer.core.files import write_atomic
from trainer.core.records import dumps, read_or_skip

RECORD = "remote.json"
_SHARED = ("step", "epoch", "metrics", "monitor", "monitor_value", "world_size", "strategy", "run")
"""Fields that `Checkpoint` and `CommitInfo` have in common."""


@dataclass(frozen=True, kw_only=True)
class RemoteEntry(CommitInfo):
    """A checkpoint in the object store."""

    name: str
    time: float
    bytes: int

    def checkpoint(self, directory: Path) -> Checkpoint:
        """Return it with the path that it would be fetched to."""
        return Checkpoint(
            path=directory / self.name,
            mode=self.monitor_mode,
            **{name: getattr(self, name) for name in ("time", "bytes", "layout", *_SHARED)},
        )


@dataclass(frozen=True, kw_only=True)
class RemoteRecord:
    """The content of `remote.json`."""

    url: str
    checkpoints: list[RemoteEntry] = field(default_factory=list)


def write(directory: Path, url: str, checkpoints: list[Checkpoint]) -> None:
    """Replace the record in the folder of the checkpoints."""
    entries = [
        RemoteEntry(
            **{name: getattr(one, name) for name in _SHARED},
            monitor_mode=one.mode,
            layout="file" if one.layout == "file" else "sharded",
            name=one.path.name,
            time=one.time,
            bytes=one.bytes,
        )
        for one in checkpoints
    ]
    write_atomic(directory / RECORD, dumps(RemoteRecord(url=url, checkpoints=entries), indent=1))


def read(directory: Path) -> dict[Path, tuple[Checkpoint, str]]:
    """Return the recorded checkpoints with their URLs, by the paths that they would be fetched to."""
    record = read_or_skip(RemoteRecord, directory / RECORD)
    entries = [one for one in record.checkpoints if is_named_as_checkpoint(Path(one.name))] if record else []
    return {
        directory / one.name: (one.checkpoint(directory), f"{record.url}/{one.name}")
        for one in entries
        if record and "/" not in one.name
    }
