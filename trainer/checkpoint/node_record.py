"""Which nodes have which of the checkpoints on the disks of several nodes: `checkpoints/nodes.json` of the run.

Rank 0 writes it, for commands that cannot see those disks. What a restart uses, the nodes report themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint.store import Checkpoint, is_named_as_checkpoint
from trainer.core.files import write_atomic
from trainer.core.records import dumps, read_or_skip

RECORD = "nodes.json"


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """The content of `nodes.json`."""

    hosts: list[str] = field(default_factory=list)
    """The host of each node of the last attempt."""
    checkpoints: dict[str, list[int]] = field(default_factory=dict)
    """The numbers of the nodes that have a part, by the name of the checkpoint."""


def write(directory: Path, hosts: Sequence[str], held: Mapping[str, Sequence[int]]) -> None:
    """Replace the record in the folder of the run's checkpoints by what the nodes have reported."""
    record = NodeRecord(hosts=list(hosts), checkpoints={name: list(nodes) for name, nodes in held.items()})
    write_atomic(directory / RECORD, dumps(record, indent=1))


def add(directory: Path, saved: Checkpoint, kept: Sequence[Checkpoint]) -> None:
    """Record a checkpoint that all its nodes have committed.

    Args:
        directory: The folder of the run's checkpoints.
        saved: The part of node 0; a single file has no others.
        kept: What node 0 has; the other nodes keep the same.
    """
    record = _read(directory)
    names = {one.path.name for one in kept}
    held = {name: nodes for name, nodes in record.checkpoints.items() if name in names}
    held[saved.path.name] = list(range(1 if saved.layout == "file" else len(record.hosts)))
    write(directory, record.hosts, held)


def remove(directory: Path) -> None:
    """Delete the record: the run has finished, and the nodes have deleted theirs."""
    (directory / RECORD).unlink(missing_ok=True)


def read(directory: Path) -> dict[str, list[tuple[int, str]]]:
    """Return the numbers and hosts of the nodes that have a part, by the name of the checkpoint."""
    record = _read(directory)
    return {
        name: [(node, record.hosts[node]) for node in nodes if 0 <= node < len(record.hosts)]
        for name, nodes in record.checkpoints.items()
        if is_named_as_checkpoint(Path(name)) and "/" not in name
    }


def _read(directory: Path) -> NodeRecord:
    return read_or_skip(NodeRecord, directory / RECORD) or NodeRecord()
