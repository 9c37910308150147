"""What the ranks of one node of several and their node process tell each other: files in a folder of that node.

A file system that all nodes share would have to serve every rank several times a second. So the ranks of a job on
several nodes write their heartbeats to a folder of their node and look there for requests. The node process writes all
of its heartbeats as one file into the run directory, and passes requests on (`supervise/relay.py`). On one node there
is nothing to save: the ranks use the run directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.core import records
from trainer.core.files import read_live, write_live
from trainer.runs.records import HeartbeatRecord

NODE_FOLDER_VARIABLE = "TRAINER_NODE_FOLDER"
"""Path of the folder, for the ranks; unset on one node."""


@dataclass(frozen=True)
class NodeFolder:
    """The files in this folder, which only the user can enter.

    Args:
        path: The folder, which exists.
    """

    path: Path

    @staticmethod
    def of_this_rank() -> NodeFolder | None:
        """Return the folder of this rank's node; None in a job on one node."""
        path = os.environ.get(NODE_FOLDER_VARIABLE)
        return NodeFolder(Path(path)) if path else None

    @property
    def stop_request(self) -> Path:
        """The file whose existence requests that the ranks save and stop."""
        return self.path / "stop"

    def collectives_request(self, attempt: int) -> Path:
        """Return the file that requests the trace of collectives from the ranks of this node."""
        return self.path / f"collectives-{attempt:02d}.request"

    def write_heartbeat(self, rank: int, beat: HeartbeatRecord) -> None:
        """Overwrite the heartbeat of a rank in place."""
        write_live(self.path / f"rank-{rank}.json", records.to_json(beat))

    def heartbeats(self) -> dict[int, HeartbeatRecord]:
        """Return the last heartbeat of each rank of this node, in order of rank."""
        beats = {}
        for path in self.path.glob("rank-*.json"):
            if content := read_live(path):
                beats[int(path.stem.removeprefix("rank-"))] = records.from_json(HeartbeatRecord, content, path)
        return dict(sorted(beats.items()))
