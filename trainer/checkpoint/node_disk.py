"""Checkpoints on the disks of several nodes (`checkpoint.local_dir`): each node commits what its own ranks wrote.

    <checkpoint.local_dir>/<run>/node-1/step-00000540/COMMIT             sizes and checksums of this node's files
                                                     /shards/__8_0.distcp ...

The number of the node is in the path, so that a node that has another place in the job, or a folder that is on a shared
file system, is never mixed up with another. One save has the same `save_id` in the COMMIT of every node. It is complete
if every node has it; `train/node_checkpoints.py` finds that out when a job restarts. A node deletes an older one only
when all nodes have committed. This module does not import torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.commit import StoredFile
from trainer.core import records

_LISTED = ".files-of-rank-"


@dataclass(frozen=True)
class NodeDisk:
    """The folder of this node's checkpoints, and this rank's place on the node."""

    directory: Path
    local_rank: int
    ranks_on_node: int

    @property
    def leads(self) -> bool:
        """Whether this rank creates and commits the folders of its node."""
        return self.local_rank == 0

    def here(self, path: Path) -> Path:
        """Return the folder on this node of a checkpoint that has the path `path` on some node."""
        return self.directory / path.name

    def is_of_tier(self, path: Path) -> bool:
        """Return whether `path` is in the folder of some node."""
        return path.parent.parent == self.directory.parent and path.parent.name.startswith("node-")


def folder_of(run_folder: Path, node: int) -> Path:
    """Return the folder of one node's checkpoints."""
    return run_folder / f"node-{node}"


def new_save_id() -> str:
    """Return the name that one save has on all nodes."""
    return secrets.token_hex(8)


def list_files(staging: Path, rank: int, files: dict[str, StoredFile]) -> None:
    """Leave the sizes and checksums of a rank's files to the leader of the node, in the staging folder."""
    (staging / f"{_LISTED}{rank}").write_text(records.dumps(files))


def listed_files(staging: Path, ranks: Iterable[int]) -> dict[str, StoredFile]:
    """Return, and delete, what the ranks of this node have listed."""
    files: dict[str, StoredFile] = {}
    for rank in ranks:
        path = staging / f"{_LISTED}{rank}"
        files |= records.loads(dict[str, StoredFile], path.read_text(), str(path))
        path.unlink()
    return files
