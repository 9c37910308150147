"""Sharded checkpoints: each rank writes its shards, rank 0 commits. Any world size and strategy can read them.

    step-00000120/COMMIT
                  state.pt              everything but the sharded tensors, in plain types
                  shards/index.json     which file holds which part of which tensor (`shard_index.py`)
                  shards/__0_0.distcp   the shards of rank 0 ...

Tensors have flat, plain names: `model/<name>` and `optimizer/<number>/<name>/<key>`. The shards are written and read by
torch.distributed.checkpoint, but for its pickles: the index is JSON, and a shard is loaded as a tensor or not at all.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from trainer.checkpoint import commit, data_file, hashing, node_disk, shard_index
from trainer.checkpoint.commit import CommitInfo, SaveFailed, Staging, StoredFile
from trainer.checkpoint.faults import fault_point
from trainer.checkpoint.host_copies import HostBuffers, StreamBuffer, is_on_device
from trainer.checkpoint.node_disk import NodeDisk, new_save_id
from trainer.checkpoint.shard_index import SHARDS, Chunk
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.wellformed import BadCheckpoint
from trainer.core.errors import TrainerError

Result = TypeVar("Result")


@dataclass
class HostShard:
    """This rank's shard of a tensor, with the interface of torch.distributed.checkpoint.

    It is in host memory, or on a device from which it is copied in chunks while it is written.
    """

    local: torch.Tensor
    offsets: torch.Size
    """Offset of the shard in the whole tensor."""
    shape: torch.Size
    """Shape of the whole tensor."""
    chunk_bytes: int | None = None
    """Size of the chunks, which are whole rows, at least one; None: the shard is one chunk."""

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.local.numel() == 0 and self.shape.numel() > 0:
            return []  # fewer rows than ranks: this rank has none
        properties = TensorProperties.create_from_tensor(self.local)
        items = []
        for first in range(0, self.local.shape[0], self._rows) if self._rows else [0]:
            chunk = ChunkStorageMetadata(offsets=self._offsets(first), sizes=self._chunk(first).shape)
            data = TensorWriteData(chunk=chunk, properties=properties, size=self.shape)
            items.append(
                WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)
            )
        return items

    def chunk_at(self, offsets: torch.Size) -> torch.Tensor:
        """Return the chunk that begins at `offsets` of the whole tensor."""
        return self._chunk(offsets[0] - self.offsets[0] if self._rows else 0)

    @property
    def _rows(self) -> int:
        """Rows in a chunk; 0: the shard is one chunk."""
        if self.chunk_bytes is None or self.local.dim() == 0 or self.local.nbytes <= self.chunk_bytes:
            return 0
        return max(1, self.chunk_bytes * self.local.shape[0] // self.local.nbytes)

    def _offsets(self, first: int) -> torch.Size:
        return torch.Size([self.offsets[0] + first, *self.offsets[1:]]) if self._rows else self.offsets

    def _chunk(self, first: int) -> torch.Tensor:
        return self.local[first : first + self._rows] if self._rows else self.local


class _Planner(DefaultSavePlanner):
    """Finds the data of a HostShard, which the default planner cannot, and passes it through `buffer`."""

    def __init__(self, buffer: StreamBuffer) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._buffer = buffer

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the chunk that `index` names; the next call may overwrite it."""
        shard: HostShard = self.state_dict[index.fqn]
        assert index.offset is not None
        return self._buffer.take(shard.chunk_at(index.offset))


def host_shard(tensor: torch.Tensor, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostShard:
    """Return the local shard of a DTensor, or any other tensor unsharded, passed through `copy`."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return HostShard(copy(tensor.to_local().detach()), torch.Size(chunk.offsets), tensor.shape)
    return HostShard(copy(tensor.detach()), torch.Size([0] * tensor.dim()), tensor.shape)


def owned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of which this rank saves its part.

    Of replicated shards (HSDP) each replica group saves about the same number of bytes, and each shard is saved once.
    All ranks decide alike, from names and shapes, so that a shard is copied to the host only where it is saved.
    """
    kept, assigned = {}, {}  # type: dict[str, torch.Tensor], dict[tuple[Any, tuple[int, ...]], list[int]]
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, DTensor) and (coordinate := tensor.device_mesh.get_coordinate()) is not None:
            replicated = tuple(number for number, placed in enumerate(tensor.placements) if placed.is_replicate())
            sizes = [tensor.device_mesh.size(number) for number in replicated]
            load = assigned.setdefault((tensor.device_mesh, replicated), [0] * math.prod(sizes))
            owner = load.index(min(load))
            load[owner] += tensor.numel() * tensor.element_size()
            own = 0
            for number, size in zip(replicated, sizes, strict=True):
                own = own * size + coordinate[number]
            if own != owner:
                continue
        kept[name] = tensor
    return kept


def to_host(tensors: dict[str, torch.Tensor], buffers: HostBuffers) -> dict[str, HostShard]:
    """Return this rank's shards, copied into `buffers`. Call `buffers.finish()` afterwards."""

    def part(name: str, tensor: torch.Tensor) -> HostShard:
        return host_shard(tensor, lambda local: buffers.copy(name, local))

    return {name: part(name, tensor) for name, tensor in tensors.items()}


def in_place(tensors: dict[str, torch.Tensor], chunk_bytes: int) -> dict[str, HostShard]:
    """Return this rank's shards where they are; those on a device are written in chunks of `chunk_bytes`."""
    parts = {name: host_shard(tensor, lambda local: local) for name, tensor in tensors.items()}
    for part in parts.values():
        if is_on_device(part.local):
            part.chunk_bytes = chunk_bytes
    return parts


def local_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Return the size in bytes of this rank's shards."""
    return sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in tensors.values())


@dataclass(frozen=True)
class _Problem:
    """Why a rank could not do its part of a save."""

    text: str
    fix: str
    """Empty: not known."""


_NAMED_RANKS = 4
"""Ranks whose problems are named: a full disk of a file server is that of thousands."""


def _of_all(problems: dict[int, _Problem]) -> _Problem | None:
    """Return the problems of several ranks as one; None if there are none."""
    if not problems:
        return None
    texts = [f"rank {rank}: {problem.text}" for rank, problem in list(problems.items())[:_NAMED_RANKS]]
    if len(problems) > _NAMED_RANKS:
        texts.append(f"and {len(problems) - _NAMED_RANKS} more ranks")
    fixes = dict.fromkeys(problem.fix for problem in problems.values() if problem.fix)
    return _Problem("; ".join(texts), " ".join(fixes) or "See the logs of those ranks.")


@dataclass
class ShardedWrite:
    """One save by all ranks of `group`, a gloo group that nothing else uses during the save.

    `group` None: a save by this process alone.
    """

    attempt: int
    group: dist.ProcessGroup | None
    buffer: StreamBuffer
    """Through which shards on a device pass."""
    on_read: Callable[[], None] = lambda: None
    """Called when the shards of this rank have been read, and may change."""
    disk: NodeDisk | None = None
    """Where this node has its part; None: all ranks write into one folder."""

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
            SaveFailed: A rank failed; raised on every rank. Of one process other errors are raised as they are.
        """
        staging = Staging(target, self.attempt, info.run)
        try:
            parts = self._together(target, prepare)[self._rank]
            needed = sum(part.local.nbytes for part in parts.values())
            sizes = self._together(target, lambda: needed)
            if self.disk is not None:
                info = replace(info, save_id=self._together(target, new_save_id)[0])
                sizes = [needed * self.disk.ranks_on_node]
            if not self._together(target, lambda: self._begin(staging, sizes))[0]:
                return False
            self._together(target, lambda: self._write_shards(staging, parts))
            files = self._together(target, lambda: self._own_files(staging, write_rest))
            self._together(target, lambda: self._commit(staging, files, info))
        except BaseException as error:
            if self._leads:
                staging.discard()
            if isinstance(error, OSError):
                raise commit.failed(target, error) from error
            raise
        return True

    @property
    def _leads(self) -> bool:
        """Whether this rank creates and commits the folder."""
        return self._rank == 0 if self.disk is None else self.disk.leads

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def _together(self, target: Path, step: Callable[[], Result]) -> list[Result]:
        """Run `step` on every rank and return the results of all ranks; on other ranks than 0 only some of them.

        Every rank has its own result and that of rank 0, under their numbers. If a step raises on one rank, SaveFailed
        is raised on all ranks, so that none is left waiting in a collective.
        """
        try:
            outcome: tuple[_Problem | None, Any] = (None, step())
        except Exception as error:
            if self.group is None:
                raise
            text = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
            outcome = (_Problem(text, commit.fix_of(error, target)), None)
        if self.group is None:
            return [outcome[1]]
        # The shards stay on their rank; only small objects are sent.
        small = outcome if not isinstance(outcome[1], dict) or outcome[0] else (None, _without_parts(outcome[1]))
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.gather_object(small, gathered if self._rank == 0 else None, dst=0, group=self.group)
        verdict: list[Any] = [None, None]
        if self._rank == 0:
            problems = {rank: problem for rank, (problem, _) in enumerate(gathered) if problem is not None}
            verdict = [_of_all(problems), small[1]]
        dist.broadcast_object_list(verdict, src=0, group=self.group)
        if verdict[0]:
            raise SaveFailed(f"Checkpoint {target.name} could not be written: {verdict[0].text}", verdict[0].fix)
        results: list[Any] = [one and one[1] for one in gathered]
        results[0] = verdict[1]
        results[self._rank] = outcome[1]
        return results

    def _begin(self, staging: Staging, sizes: list[int]) -> bool:
        if not self._leads:
            return True
        fault_point("save.begin")
        CheckpointStore(staging.target.parent, staging.run).clean_leftovers(self.attempt)
        if self.disk is not None and os.path.lexists(staging.target):
            commit.set_aside(staging.target)  # one that other nodes may not have
        elif commit.already_committed(staging.target):
            return False
        commit.require_space(staging.target.parent, sum(sizes))
        staging.create()
        return True

    def _write_shards(self, staging: Staging, parts: dict[str, HostShard]) -> None:
        writer, planner, alone = _Writer(staging), _Planner(self.buffer), self.group is None
        try:
            with _quiet(alone), data_file.without_crc():
                dcp_save(parts, storage_writer=writer, planner=planner, process_group=self.group, no_dist=alone)
        except CheckpointException as error:  # on every rank; it is no Exception
            if self._rank in error.failures:
                raise error.failures[self._rank][0] from None
        self.on_read()

    def _own_files(self, staging: Staging, write_rest: Callable[[Staging], None]) -> dict[str, StoredFile]:
        """Return the files that this rank wrote, with their checksums."""
        if self._rank == 0:
            write_rest(staging)
        if self.disk is not None:
            node_disk.list_files(staging.path, self._rank, staging.files)
            return {}
        return staging.files

    def _commit(self, staging: Staging, files: list[dict[str, StoredFile]], info: CommitInfo) -> None:
        if not self._leads:
            return
        if self.disk is not None:
            ranks = range(self._rank, self._rank + self.disk.ranks_on_node)
            files = [node_disk.listed_files(staging.path, ranks)]
        for files_of_rank in files:
            staging.files.update(files_of_rank)
        commit.commit(staging, info)


def _without_parts(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if not isinstance(item, HostShard)}


class _StagedFiles(FileSystem):
    """The files of a staging folder, which are hashed while torch writes them, and then synced."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a new file in `shards/`."""
        assert mode == "wb", mode
        with self._staging.file(f"{SHARDS}/{Path(path).name}") as file:
            yield file


class _Writer(FileSystemWriter):
    """Writes one file per rank into a staging folder, and the index as JSON."""

    def __init__(self, staging: Staging) -> None:
        super().__init__(
            staging.path / SHARDS,
            single_file_per_rank=True,
            sync_files=False,  # `Staging.file` does
            per_thread_copy_ahead=0,  # one chunk at a time: the planner's buffer has only one
        )
        self._staging = staging
        self.fs = _StagedFiles(staging)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write `index.json` in place of the pickle; called on one rank with the results of all."""
        places = {(one.index.fqn, one.index.offset): one.storage_data for of_rank in results for one in of_rank}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            chunks = []
            for chunk in entry.chunks:
                place = places[name, chunk.offsets]
                position = (place.relative_path, place.offset, place.length)
                chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), *position))
            tensors[name] = shard_index.Tensor(entry.size, entry.properties.dtype, chunks)
        with self._staging.file(f"{SHARDS}/{shard_index.NAME}") as file:
            file.write(shard_index.encoded(tensors))
        metadata.state_dict_metadata = {}  # torch sends it to every rank, which has no use for it


class _Reader(FileSystemReader):
    """Reads the index without a pickle, and from the shards nothing but tensors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path / SHARDS)
        self._checkpoint = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked index in the form that the planner expects."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for name, one in shard_index.read(self._checkpoint).items():
            chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in one.chunks]
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=one.dtype), one.shape, chunks)
            for chunk in one.chunks:
                places[MetadataIndex(name, chunk.offsets)] = _StorageInfo(chunk.file, chunk.begin, chunk.length)
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Fill the tensors of the plan, with several threads, each of which reads a part of the files in order."""

        def place(item: ReadItem) -> _StorageInfo:
            found: _StorageInfo = self.storage_data[item.storage_index]
            return found

        items = sorted(plan.items, key=lambda item: (place(item).relative_path, place(item).offset))
        shares = _dealt(items, [place(item).length for item in items], hashing.threads(_ranks_on_node()))
        with ThreadPoolExecutor(len(shares), "checkpoint-read") as pool:
            for done in [pool.submit(self._read_items, share, planner) for share in shares]:
                done.result()
        filled: torch.futures.Future[None] = torch.futures.Future()
        filled.set_result(None)
        return filled

    def _read_items(self, items: list[ReadItem], planner: LoadPlanner) -> None:
        """Read the items, which are sorted by file. At most one chunk of a tensor is in memory."""
        for file, of_file in groupby(items, lambda item: self.storage_data[item.storage_index].relative_path):
            with open(commit.listed_file(self._checkpoint, f"{SHARDS}/{file}"), "rb") as opened:
                for item in of_file:
                    self._read_item(opened, item, planner)

    def _read_item(self, opened: BinaryIO, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type != LoadItemType.TENSOR:
            raise BadCheckpoint(f"{self._checkpoint}: {item.storage_index.fqn} is not a tensor", "use another one")
        place = self.storage_data[item.storage_index]
        tensor = data_file.load_part(opened, place.offset, place.length)
        target = planner.resolve_tensor(item).detach()
        part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
        if part.shape != target.shape:
            raise BadCheckpoint(
                f"{self._checkpoint}: the shard of {item.storage_index.fqn} is not the one of the index",
                "use another checkpoint",
            )
        target.copy_(part)
        planner.commit_tensor(item, target)


def _dealt(items: list[ReadItem], sizes: list[int], count: int) -> list[list[ReadItem]]:
    """Return up to `count` runs of consecutive items, of about the same size in bytes; at least one run."""
    per_run, runs, filled = max(1, -(-sum(sizes) // count)), [[]], 0  # type: int, list[list[ReadItem]], int
    for item, size in zip(items, sizes, strict=True):
        if filled >= per_run * len(runs):
            runs.append([])
        runs[-1].append(item)
        filled += size
    return runs


def _ranks_on_node() -> int:
    """Return how many ranks of this job read at the same time on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of every tensor in a sharded checkpoint folder."""
    return {name: (one.shape, one.dtype) for name, one in shard_index.read(path).items()}


def read_into(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors and DTensors in place, each rank its own shards; no communication.

    Raises:
        BadCheckpoint: The index or a shard is malformed, or parts of a tensor are on the disks of other nodes.
    """
    if not tensors:
        return
    _require_all(path, tensors)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _quiet(True):
        try:
            dcp_load(dict(tensors), storage_reader=_Reader(path), planner=planner, no_dist=True)
        except CheckpointException as error:
            for cause in error.failures.values():
                if isinstance(cause[0], BadCheckpoint):
                    raise cause[0] from None
            raise


def _require_all(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Check that the chunks of a node's part cover the tensors: torch leaves what is in no chunk as it is.

    Raises:
        BadCheckpoint: They do not.
    """
    if commit.read_commit(path).save_id is None:
        return  # of a whole checkpoint the index is complete, which was checked
    index = shard_index.read(path)
    for name in tensors.keys() & index.keys():
        part = host_shard(tensors[name], lambda local: local)
        if _covered(index[name], part) < part.local.numel():
            raise BadCheckpoint(
                f"{path} has not all of {name}: other parts are on the disks of other nodes",
                "resume with the strategy and the number of ranks that it was saved with, or delete the folder",
            )


def _covered(stored: shard_index.Tensor, part: HostShard) -> int:
    """Return how many elements of a shard are in the chunks, which do not overlap."""
    shape, covered = part.local.shape, 0
    for chunk in stored.chunks:
        sides = zip(part.offsets, shape, chunk.offsets, chunk.sizes, strict=True)
        covered += math.prod(max(0, min(a + n, b + m) - max(a, b)) for a, n, b, m in sides)
    return covered


@contextmanager
def _quiet(single_process: bool) -> Iterator[None]:
    """Silence torch's warning that a save or load runs in one process, which is intended here."""
    with warnings.catch_warnings():
        if single_process:
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable|not)")
        yield
