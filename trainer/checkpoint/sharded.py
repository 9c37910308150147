"""Sharded checkpoints: each rank writes its shards, rank 0 commits. Any world size and strategy can read them.

    step-00000120/COMMIT
                  state.pt              everything but the sharded tensors, in plain types
                  shards/.metadata      torch.distributed.checkpoint: which file holds which part of which tensor
                  shards/__0_0.distcp   the shards of rank 0 ...

Tensors have flat, plain names: `model/<name>` and `optimizer/<number>/<name>/<key>`. `.metadata` is a pickle
(https://github.com/pytorch/pytorch/issues/127525), so it is read only from a folder whose COMMIT has been verified.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from trainer.checkpoint import commit
from trainer.checkpoint.commit import CommitInfo, SaveFailed, Staging, StoredFile
from trainer.checkpoint.faults import fault_point
from trainer.checkpoint.host_copies import HostBuffers
from trainer.checkpoint.store import CheckpointStore

SHARDS = "shards"
Result = TypeVar("Result")


@dataclass
class HostShard:
    """This rank's shard of a tensor in host memory, with the interface of torch.distributed.checkpoint."""

    local: torch.Tensor
    offsets: torch.Size
    """Offset of the shard in the whole tensor."""
    shape: torch.Size
    """Shape of the whole tensor."""

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.local.numel() == 0 and self.shape.numel() > 0:
            return []  # fewer rows than ranks: this rank has none
        chunk = ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape)
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(chunk=chunk, properties=properties, size=self.shape)
        return [WriteItem(index=MetadataIndex(name, self.offsets), type=WriteItemType.SHARD, tensor_data=data)]


class _Planner(DefaultSavePlanner):
    """Finds the data of a HostShard; the default planner handles only tensors."""

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the local data of the HostShard that `index` names."""
        shard: HostShard = self.state_dict[index.fqn]
        return shard.local


def host_shard(tensor: torch.Tensor, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostShard:
    """Return the local shard of a DTensor, or any other tensor unsharded, passed through `copy`."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return HostShard(copy(tensor.to_local().detach()), torch.Size(chunk.offsets), tensor.shape)
    return HostShard(copy(tensor.detach()), torch.Size([0] * tensor.dim()), tensor.shape)


def to_host(tensors: dict[str, torch.Tensor], buffers: HostBuffers | None) -> dict[str, HostShard]:
    """Return this rank's shards, copied into `buffers` if given. Call `buffers.finish()` afterwards."""

    def part(name: str, tensor: torch.Tensor) -> HostShard:
        if buffers is None:
            return host_shard(tensor, lambda local: local.cpu())
        return host_shard(tensor, lambda local: buffers.copy(name, local))

    return {name: part(name, tensor) for name, tensor in tensors.items()}


@dataclass
class ShardedWrite:
    """One save by all ranks of `group`, a gloo group that nothing else uses during the save.

    `group` None: a save by this process alone.
    """

    attempt: int
    group: dist.ProcessGroup | None

    def run(
        self,
        target: Path,
        info: CommitInfo,
        prepare: Callable[[], dict[str, HostShard]],
        write_rest: Callable[[Staging], None],
    ) -> bool:
        """Write one checkpoint under the commit protocol. Collective.

        Args:
            target: Folder of the checkpoint.
            info: Content of COMMIT.
            prepare: Returns this rank's shards; it may raise.
            write_rest: Writes the other files; called on rank 0.

        Returns:
            False if the target was already committed and intact.

        Raises:
            SaveFailed: A rank failed; raised on every rank.
        """
        staging = Staging(target, self.attempt)
        try:
            parts = self._together(prepare)[self._rank]
            needed = sum(part.local.nbytes for part in parts.values())
            total_bytes = sum(self._together(lambda: needed))
            if not self._together(lambda: self._begin(staging, total_bytes))[0]:
                return False
            self._together(lambda: self._write_shards(staging, parts))
            files = self._together(lambda: self._own_files(staging, write_rest))
            self._together(lambda: self._commit(staging, files, info))
        except BaseException:
            if self._rank == 0:
                staging.discard()
            raise
        return True

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def _together(self, step: Callable[[], Result]) -> list[Result]:
        """Run `step` on every rank and return the results of all ranks.

        If it raises on one rank, SaveFailed is raised on all ranks, so that none is left waiting in a collective.
        """
        try:
            outcome: tuple[str | None, Any] = (None, step())
        except Exception as error:
            if self.group is None:
                raise
            outcome = (f"{type(error).__name__}: {error}", None)
        if self.group is None:
            return [outcome[1]]
        # The shards stay on their rank; only small objects are sent.
        small = outcome if not isinstance(outcome[1], dict) or outcome[0] else (None, _without_parts(outcome[1]))
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, small, group=self.group)
        problems = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(gathered) if error is not None]
        if problems:
            raise SaveFailed("; ".join(problems), "See the logs of those ranks.")
        results = [result for _, result in gathered]
        results[self._rank] = outcome[1]
        return results

    def _begin(self, staging: Staging, total_bytes: int) -> bool:
        if self._rank != 0:
            return True
        fault_point("save.begin")
        CheckpointStore(staging.target.parent).clean_leftovers(self.attempt)
        if commit.already_committed(staging.target):
            return False
        commit.require_space(staging.target.parent, total_bytes)
        staging.create()
        return True

    def _write_shards(self, staging: Staging, parts: dict[str, HostShard]) -> None:
        writer = FileSystemWriter(staging.path / SHARDS, single_file_per_rank=True, sync_files=True)
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _quiet(self.group is None):
            dcp_save(
                parts, storage_writer=writer, planner=planner, process_group=self.group, no_dist=self.group is None
            )

    def _own_files(self, staging: Staging, write_rest: Callable[[Staging], None]) -> dict[str, StoredFile]:
        """Hash the files that this rank wrote."""
        for path in sorted((staging.path / SHARDS).glob(f"__{self._rank}_*")):
            staging.adopt(f"{SHARDS}/{path.name}")
        if self._rank == 0:
            staging.adopt(f"{SHARDS}/.metadata")
            write_rest(staging)
        return staging.files

    def _commit(self, staging: Staging, files: list[dict[str, StoredFile]], info: CommitInfo) -> None:
        if self._rank == 0:
            for files_of_rank in files:
                staging.files.update(files_of_rank)
            commit.commit(staging, info)


def _without_parts(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if not isinstance(item, HostShard)}


def shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of every tensor in a sharded checkpoint folder."""
    metadata = FileSystemReader(path / SHARDS).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_into(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors and DTensors in place, each rank its own shards; no communication."""
    if not tensors:
        return
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _quiet(True):
        dcp_load(dict(tensors), storage_reader=FileSystemReader(path / SHARDS), planner=planner, no_dist=True)


@contextmanager
def _quiet(single_process: bool) -> Iterator[None]:
    """Silence torch's warning that a save or load runs in one process, which is intended here."""
    with warnings.catch_warnings():
        if single_process:
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable|not)")
        yield
