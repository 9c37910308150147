"""Sharded checkpoints: every rank writes its part, rank 0 commits; any world size and strategy reads them.

    step-00000120/COMMIT
                  state.pt              everything that is not a sharded tensor, plain types
                  shards/.metadata      torch.distributed.checkpoint: which file holds which part of which tensor
                  shards/__0_0.distcp   the parts of rank 0 ...

Tensors have flat, plain names: `model/<name>` and `optimizer/<number>/<name>/<key>`. `.metadata` is a pickle
(pytorch issue 127525), so it is read only from a folder whose COMMIT has been checked.
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
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from trainer.checkpoint import commit
from trainer.checkpoint.commit import CommitInfo, SaveFailed, Staging
from trainer.checkpoint.host_copies import HostBuffers
from trainer.checkpoint.store import CheckpointStore

SHARDS = "shards"
Result = TypeVar("Result")


@dataclass
class HostShard:
    """This rank's part of a tensor, in host memory, as torch.distributed.checkpoint asks for it."""

    local: torch.Tensor
    offsets: torch.Size
    """Where the part begins in the whole."""
    shape: torch.Size
    """Of the whole."""

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.local.numel() == 0 and self.shape.numel() > 0:
            return []  # fewer rows than ranks: nothing is left for this one
        chunk = ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape)
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(chunk=chunk, properties=properties, size=self.shape)
        return [WriteItem(index=MetadataIndex(name, self.offsets), type=WriteItemType.SHARD, tensor_data=data)]


class _Planner(DefaultSavePlanner):
    """Finds the data of a HostShard; the default one asks only tensors for their parts."""

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].local


def host_shard(tensor: torch.Tensor, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostShard:
    """The local part of a DTensor, or the whole of another tensor, as `copy` returns it."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()
        return HostShard(copy(tensor.to_local().detach()), torch.Size(chunk.offsets), tensor.shape)
    return HostShard(copy(tensor.detach()), torch.Size([0] * tensor.dim()), tensor.shape)


def to_host(tensors: dict[str, torch.Tensor], buffers: HostBuffers | None) -> dict[str, HostShard]:
    """The parts of this rank; copied into `buffers` if given. Call `buffers.finish()` afterwards."""

    def part(name: str, tensor: torch.Tensor) -> HostShard:
        if buffers is None:
            return host_shard(tensor, lambda local: local.cpu())
        return host_shard(tensor, lambda local: buffers.copy(name, local))

    return {name: part(name, tensor) for name, tensor in tensors.items()}


@dataclass
class ShardedWrite:
    """One save by all ranks of `group` (gloo; nobody else may use it meanwhile). None: this process alone."""

    attempt: int
    group: dist.ProcessGroup | None

    def run(
        self,
        target: Path,
        info: CommitInfo,
        prepare: Callable[[], dict[str, HostShard]],
        write_rest: Callable[[Staging], None],
    ) -> bool:
        """Stage, write, commit. Collective; raises SaveFailed on every rank if any rank fails.

        `prepare` gives this rank's parts (it may raise), `write_rest` writes the other files on rank 0.
        Returns False if the target was committed before.
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
        """`step` on every rank, and what it returned on each; if one raised, SaveFailed on all, so that none waits."""
        try:
            outcome: tuple[str | None, Any] = (None, step())
        except Exception as error:
            if self.group is None:
                raise
            outcome = (f"{type(error).__name__}: {error}", None)
        if self.group is None:
            return [outcome[1]]
        # The parts themselves stay where they are; what travels is small.
        small = outcome if not isinstance(outcome[1], dict) or outcome[0] else (None, _without_parts(outcome[1]))
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, small, group=self.group)
        problems = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(gathered) if error is not None]
        if problems:
            raise SaveFailed("; ".join(problems), "Look at the logs of those ranks.")
        results = [result for _, result in gathered]
        results[self._rank] = outcome[1]
        return results

    def _begin(self, staging: Staging, total_bytes: int) -> bool:
        if self._rank != 0:
            return True
        commit.fault_point("save.begin")
        CheckpointStore(staging.target.parent).clean_leftovers(self.attempt)
        if commit.already_there(staging.target):
            return False
        commit.require_space(staging.target.parent, total_bytes)
        staging.create()
        return True

    def _write_shards(self, staging: Staging, parts: dict[str, HostShard]) -> None:
        writer = dcp.FileSystemWriter(staging.path / SHARDS, single_file_per_rank=True, sync_files=True)
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _alone(self.group is None):
            dcp.save(
                parts, storage_writer=writer, planner=planner, process_group=self.group, no_dist=self.group is None
            )

    def _own_files(self, staging: Staging, write_rest: Callable[[Staging], None]) -> dict[str, dict[str, Any]]:
        """Each rank hashes what it wrote."""
        for path in sorted((staging.path / SHARDS).glob(f"__{self._rank}_*")):
            staging.adopt(f"{SHARDS}/{path.name}")
        if self._rank == 0:
            staging.adopt(f"{SHARDS}/.metadata")
            write_rest(staging)
        return staging.files

    def _commit(self, staging: Staging, files: list[dict[str, dict[str, Any]]], info: CommitInfo) -> None:
        if self._rank == 0:
            for of_rank in files:
                staging.files.update(of_rank)
            commit.commit(staging, info)


def _without_parts(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if not isinstance(item, HostShard)}


def shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in a sharded checkpoint folder."""
    metadata = dcp.FileSystemReader(path / SHARDS).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_into(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors and DTensors in place, each rank what it holds; no communication."""
    if not tensors:
        return
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _alone(True):
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path / SHARDS), planner=planner, no_dist=True)


@contextmanager
def _alone(yes: bool) -> Iterator[None]:
    """Without torch's warning that a save or a load by one process is one, which is what is wanted here."""
    with warnings.catch_warnings():
        if yes:
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable|not)")
        yield
