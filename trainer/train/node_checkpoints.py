"""Checkpoints on the disks of several nodes: which of them are whole, and what a node has to get from rank 0.

Each node has the files of its own ranks (`checkpoint/node_disk.py`). On a resume a rank reads its own file, and what
rank 0 wrote: `state.pt`, the index, and the tensors that all ranks share. Rank 0 sends that to the other nodes. Under
ddp it is everything. A node that was replaced has nothing, and the job then starts from the run directory.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint import commit, node_record
from trainer.checkpoint.commit import COMMIT, Staging, StoredFile
from trainer.checkpoint.node_disk import NodeDisk
from trainer.checkpoint.store import Checkpoint, CheckpointStore
from trainer.checkpoint.tiers import is_superseded
from trainer.runtime import cpu_groups
from trainer.runtime.attempt import Attempt
from trainer.runtime.process import FULL_MESH_UP_TO, Rank
from trainer.runtime.torch_setup import Group
from trainer.train.checkpoint_contents import Stores

_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class _Part:
    """What a node has of a save."""

    save_id: str | None
    ranks: frozenset[int]
    """The ranks that wrote the files."""


class NodeCheckpoints:
    """The checkpoints on the disks of all nodes.

    Args:
        store: The folder of this node.
        disk: The place of this rank on its node.
        strategy: Name of the job's strategy. Another strategy needs other parts than those of a node.
        attempt: This attempt.
        group: A gloo group of all ranks.
    """

    def __init__(self, store: CheckpointStore, disk: NodeDisk, strategy: str, attempt: Attempt, group: Group) -> None:
        self.store, self.disk = store, disk
        self._strategy, self._rank, self._group = strategy, attempt.rank, group
        self._on_piece: Callable[[], None] = attempt.heartbeat.count_progress
        self._parts: list[dict[str, _Part]] = []
        """On rank 0: by node, the name of a checkpoint to what the node has of it."""
        self._hosts: list[str] = []
        """On rank 0: by node, its host."""

    def compare(self) -> None:
        """Report to rank 0 what each node has. Collective."""
        mine = (socket.gethostname(), self._own_parts()) if self.disk.leads else None
        reported = [one for one in cpu_groups.gather(mine, self._group) if one is not None]
        self._hosts, self._parts = [host for host, _ in reported], [parts for _, parts in reported]

    def record(self, directory: Path) -> None:
        """Write down for `trainer show` what each node has now. Collective.

        Args:
            directory: The folder of the run's checkpoints.
        """
        self.compare()
        if self._rank.is_first:
            names = sorted({name for parts in self._parts for name in parts})
            held = {name: [node for node, parts in enumerate(self._parts) if name in parts] for name in names}
            node_record.write(directory, self._hosts, held)

    def newer(self, starts: Iterable[tuple[float, int]], step: int) -> list[Checkpoint]:
        """Return, on rank 0, the whole checkpoints of later steps, newest first.

        Args:
            starts: Time and first step of each attempt, for `is_superseded`.
            step: That of the newest checkpoint in the run directory; 0: there is none.
        """
        found = [one for one in self.store.committed() if one.step > step and not is_superseded(one, starts)]
        return [one for one in reversed(found) if self._is_whole(one)]

    def verify(self, name: str, layout: str) -> list[str]:
        """Return the problems of the files that this rank wrote."""
        if layout == "file" and not self._rank.is_first:
            return []
        return commit.verify(self._path(name), only=lambda file: commit.writer_of(file) == self._rank.rank)

    def share(self, name: str, layout: str) -> list[str]:
        """Send what rank 0 wrote to the other nodes. Collective; returns the problems of this rank."""
        leaders = list(range(0, self._rank.world_size, self._rank.local_world_size))
        group: Any = dist.new_group(leaders, backend="gloo")
        if not self.disk.leads:
            return []
        if len(leaders) > FULL_MESH_UP_TO:
            cpu_groups.connect(group)
        return self._send(name, group) if self._rank.is_first else self._receive(name, layout, group)

    def remove_newer(self, step: int) -> None:
        """Delete what no attempt can use any more: parts of later steps than the one at which this attempt starts."""
        if self.disk.leads:
            self.store.remove_newer(step)

    def _path(self, name: str) -> Path:
        return self.disk.directory / name

    def _own_parts(self) -> dict[str, _Part]:
        return {
            one.path.name: _Part(one.save_id, frozenset(map(commit.writer_of, commit.read_commit(one.path).files)))
            for one in self.store.committed()
        }

    def _is_whole(self, one: Checkpoint) -> bool:
        """Return whether every node has its part, and the ranks are on the nodes on which they were."""
        if one.layout == "file":
            return True  # rank 0 wrote everything
        if one.strategy != self._strategy or one.world_size != self._rank.world_size or one.save_id is None:
            return False
        size = self._rank.local_world_size
        for node, parts in enumerate(self._parts):
            part = parts.get(one.path.name)
            if part is None or part.save_id != one.save_id:
                return False
            if not part.ranks <= {0, *range(node * size, (node + 1) * size)}:
                return False
        return True

    def _send(self, name: str, group: Group) -> list[str]:
        path = self._path(name)
        problems: list[str] = []
        raw = (path / COMMIT).read_bytes()
        files = {file: one for file, one in commit.read_commit(path).files.items() if commit.writer_of(file) == 0}
        dist.broadcast_object_list([raw, {file: asdict(one) for file, one in files.items()}], src=0, group=group)
        for relative, expected in files.items():
            with open(path / relative, "rb", buffering=0) as file:
                for size in reversed(_pieces(expected.bytes)):
                    piece = torch.zeros(size, dtype=torch.uint8)
                    if not problems and not _fill(file, piece):
                        problems.append(f"{relative} has become shorter")  # the others find a wrong checksum
                    dist.broadcast(piece, src=0, group=group)
                    self._on_piece()
        return problems

    def _receive(self, name: str, layout: str, group: Group) -> list[str]:
        announced: list[Any] = [None, None]
        dist.broadcast_object_list(announced, src=0, group=group)
        raw, files = announced[0], {file: StoredFile(**one) for file, one in announced[1].items()}
        staging = Staging(self._path(name), self._rank.attempt, self.store.run)
        problems: list[str] = []
        try:
            if layout == "file":
                self.store.remove_newer(-1)  # what was received at an earlier resume
            self.store.clean_leftovers(self._rank.attempt)
            commit.require_space(self.disk.directory, sum(one.bytes for one in files.values()))
            staging.create()
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        try:
            for relative, expected in files.items():
                self._receive_file(staging, relative, expected, group, problems)
            if not problems and layout == "file":
                commit.publish(staging, raw)
            elif not problems:
                self._add(staging)
        finally:
            staging.discard()
        return problems

    def _receive_file(
        self, staging: Staging, relative: str, expected: StoredFile, group: Group, problems: list[str]
    ) -> None:
        """Write a file that rank 0 sends. After a problem the pieces are still received: the other nodes wait."""
        sizes = _pieces(expected.bytes)
        try:
            if problems:
                return
            with staging.file(relative) as file:
                while sizes:
                    file.write(self._received(sizes.pop(), group).numpy())
            if staging.files[relative] != expected:
                problems.append(f"{relative}: checksum differs")
        except OSError as error:
            problems.append(f"{relative}: {error}")
        finally:
            while sizes:
                self._received(sizes.pop(), group)

    def _received(self, size: int, group: Group) -> torch.Tensor:
        piece = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(piece, src=0, group=group)
        self._on_piece()
        return piece

    def _add(self, staging: Staging) -> None:
        """Move the received files into this node's part, and list them in its COMMIT."""
        for relative in staging.files:
            os.replace(staging.path / relative, staging.target / relative)
        commit.extend(staging.target, staging.files)


def after_save(stores: Stores, rank: Rank, saved: Checkpoint, keep_last: int) -> None:
    """Delete old checkpoints of this node's disk; on rank 0 of a job on several nodes also record what is left.

    Args:
        stores: Where checkpoints are; one is on the disk of the node.
        rank: The rank that has committed a checkpoint there.
        saved: That checkpoint.
        keep_last: Number of newest checkpoints to keep.
    """
    assert stores.local is not None
    stores.local.prune(keep_last)
    if stores.disk is not None and rank.is_first:
        node_record.add(stores.run.directory, saved, stores.local.committed())


def _pieces(size: int) -> list[int]:
    """Return the sizes of the pieces of a file, the last one first: they are taken from the end."""
    whole, rest = divmod(size, _PIECE_BYTES)
    return ([rest] if rest else []) + [_PIECE_BYTES] * whole


def _fill(file: Any, piece: torch.Tensor) -> bool:
    """Read a whole piece; returns whether the file had as much."""
    view = piece.numpy().data
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True
