"""The heartbeats in a run directory: `live/rank-R.json` of a job on one node, `live/node-N.json` of one on several.

Those of an earlier attempt are kept as `live/attempt-NN-rank-R.json` and `live/attempt-NN-node-N.json`.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from trainer.core import records
from trainer.core.files import read_live, write_live
from trainer.runs.records import HeartbeatRecord, NodeHeartbeats

_NAME = re.compile(r"(?:attempt-([0-9]{2,9})-)?(rank|node)-([0-9]{1,9})\.json")
_RANK = re.compile(r"[0-9]{1,9}")


class _File(NamedTuple):
    attempt: int
    """-1: the file of the newest attempt."""
    kind: str
    """`rank` or `node`."""
    number: int
    path: Path


class Heartbeats:
    """Reads and writes the heartbeats of a run.

    Args:
        folder: `live/` of the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, rank: int) -> Path:
        """Return the file of a rank in a job on one node."""
        return self._folder / f"rank-{rank}.json"

    def node_path(self, node: int) -> Path:
        """Return the file of a node in a job on several."""
        return self._folder / f"node-{node}.json"

    def past_path(self, attempt: int, rank: int) -> Path:
        """Return the file that keeps a rank's last heartbeat of an earlier attempt."""
        return self._folder / f"attempt-{attempt:02d}-rank-{rank}.json"

    def of_rank(self, rank: int, node: int | None = None) -> HeartbeatRecord | None:
        """Return the newest heartbeat of a rank; None if there is none, or it cannot be used.

        Args:
            rank: The rank.
            node: Its node, if that is known: in a job on several nodes only one file is read then.
        """
        files = [file for file in self._files(rank) if file.attempt < 0]
        if node is not None:
            files = [file for file in files if file.kind == "rank" or file.number == node]
        beats = [_read(file).get(rank) for file in files]
        return max((beat for beat in beats if beat is not None), key=_age, default=None)

    def newest(self) -> dict[int, HeartbeatRecord]:
        """Return the newest heartbeat of every rank, by rank, including ranks that only an earlier attempt had."""
        beats: dict[int, HeartbeatRecord] = {}
        for file in self._files():
            for rank, beat in _read(file).items() if file.attempt < 0 else ():
                if rank not in beats or _age(beat) > _age(beats[rank]):
                    beats[rank] = beat
        return dict(sorted(beats.items()))

    def past(self, rank: int) -> list[HeartbeatRecord]:
        """Return a rank's last heartbeat in each earlier attempt."""
        beats = [_read(file).get(rank) for file in self._files(rank) if file.attempt >= 0]
        return [beat for beat in beats if beat is not None]

    def write(self, rank: int, beat: HeartbeatRecord) -> None:
        """Overwrite the heartbeat of a rank in place."""
        write_live(self.path(rank), records.to_json(beat))

    def write_node(self, node: int, beats: dict[int, HeartbeatRecord]) -> None:
        """Overwrite the heartbeats of a node in place."""
        ranks = {str(rank): beat for rank, beat in beats.items()}
        write_live(self.node_path(node), records.to_json(NodeHeartbeats(ranks=ranks)))

    def keep(self, attempt: int, *, rank: int | None = None, node: int | None = None) -> None:
        """Rename what earlier attempts have left, so that their last heartbeats are not overwritten.

        Args:
            attempt: The attempt that begins.
            rank: The rank that begins, in a job on one node; rank 0 also renames the files of nodes.
            node: The node that begins, in a job on several; node 0 also renames the files of ranks.
        """
        for file in self._files():
            own, others = (rank, node) if file.kind == "rank" else (node, rank)
            if file.attempt >= 0 or (file.number != own and others != 0):
                continue
            before = max((beat.attempt for beat in _read(file).values()), default=attempt)
            if before < attempt:
                with contextlib.suppress(OSError):
                    os.rename(file.path, self._folder / f"attempt-{before:02d}-{file.path.name}")

    def _files(self, rank: int | None = None) -> list[_File]:
        """Return the files that may have the heartbeat of this rank, or of any, oldest attempt first."""
        try:
            names = os.listdir(self._folder)
        except OSError:
            return []
        files = [
            _File(int(match[1] or -1), match[2], int(match[3]), self._folder / name)
            for name in names
            if (match := _NAME.fullmatch(name))
        ]
        if rank is not None:  # which node has a rank is not known, but the first one has the first
            files = [one for one in files if one.number == rank or (one.kind == "node" and rank > 0)]
        return sorted(files)


def _age(beat: HeartbeatRecord) -> tuple[int, float]:
    """Return what grows with time. The clocks of hosts may differ, so the attempt comes first."""
    return beat.attempt, beat.time


def _read(file: _File) -> dict[int, HeartbeatRecord]:
    """Return the heartbeats in a file by rank; empty if it cannot be used, which is reported."""
    content = read_live(file.path)
    if not content:
        return {}
    try:
        if file.kind == "rank":
            return {file.number: records.from_json(HeartbeatRecord, content, file.path)}
        beats = records.from_json(NodeHeartbeats, content, file.path).ranks
    except records.BadRecord as error:
        records.skip(error)
        return {}
    return {int(rank): beat for rank, beat in beats.items() if _RANK.fullmatch(rank)}
