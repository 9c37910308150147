"""Which part of which tensor is where in the shards of a checkpoint: `shards/index.json`.

torch.distributed.checkpoint writes this as a pickle (`.metadata`), and a pickle can execute code when it is read
(https://github.com/pytorch/pytorch/issues/127525). Here it is JSON. The pickles of older checkpoints are read without
any class of theirs: `_OldIndex` makes plain records of a closed list of types, and refuses everything else.

Whoever wrote it, the content is checked against COMMIT before a shard is opened: its file names, the place of each
chunk in its file, and that the tensors are no larger than the files.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.checkpoint import commit, wellformed
from trainer.checkpoint.wellformed import BadCheckpoint

SHARDS = "shards"
NAME = "index.json"
OLD_NAME = ".metadata"
VERSION = 1
_LARGEST_OLD_BYTES = 1 << 30
_LARGEST = 2**63 - 1
_last: dict[tuple[str, int, int, int], dict[str, Tensor]] = {}
"""The index that was read last: fine-tuning reads one tensor at a time."""


class Chunk(NamedTuple):
    """A part of a tensor, and the bytes of a file that hold it, written by torch.save."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    """Name of the file in `shards/`."""
    begin: int
    """First byte in the file."""
    length: int
    """Number of bytes."""


@dataclass(frozen=True)
class Tensor:
    """A tensor and its chunks."""

    shape: torch.Size
    dtype: torch.dtype
    chunks: list[Chunk]

    def only(self, listed: Collection[str]) -> Tensor:
        """Return the tensor without the chunks whose files are not listed."""
        return replace(self, chunks=[chunk for chunk in self.chunks if f"{SHARDS}/{chunk.file}" in listed])


def encoded(tensors: dict[str, Tensor]) -> bytes:
    """Return the content of an index file. Names of files are numbered, because each occurs with many tensors."""
    files = sorted({chunk.file for tensor in tensors.values() for chunk in tensor.chunks})
    number = {file: place for place, file in enumerate(files)}
    content = {
        "version": VERSION,
        "files": files,
        "tensors": {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "chunks": [[*chunk[:2], number[chunk.file], chunk.begin, chunk.length] for chunk in tensor.chunks],
            }
            for name, tensor in tensors.items()
        },
    }
    return json.dumps(content, separators=(",", ":")).encode()


def read(path: Path) -> dict[str, Tensor]:
    """Read and check the index of the checkpoint at `path`.

    Raises:
        BadCheckpoint: It is malformed, or does not fit the files that COMMIT lists.
        OSError, ValueError, UserError: As `commit.read_commit`.
    """
    found = os.stat(path / commit.COMMIT)
    key = (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _last:
        tensors = _read(path)
        _last.clear()
        _last[key] = tensors
    return _last[key]


def _read(path: Path) -> dict[str, Tensor]:
    content = commit.read_commit(path)
    listed = content.files
    is_old = f"{SHARDS}/{NAME}" not in listed
    file = commit.listed_file(path, f"{SHARDS}/{OLD_NAME if is_old else NAME}")
    try:
        tensors = _read_old(file) if is_old else _parsed(wellformed.read_json(path, f"{SHARDS}/{NAME}"))
        if content.save_id is not None:
            tensors = {name: tensor.only(listed) for name, tensor in tensors.items()}
        _check(tensors, {name: one.bytes for name, one in listed.items()}, is_part=content.save_id is not None)
    except BadCheckpoint:
        raise
    except (_Malformed, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        reason = str(error) if isinstance(error, _Malformed) else type(error).__name__
        raise _bad(path, file.name, reason) from None
    return tensors


class _Malformed(Exception):
    """What is wrong with an index."""


def _bad(path: Path, name: str, reason: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{path}: {SHARDS}/{name} is malformed: {wellformed.shown(reason)}",
        "use another checkpoint; find out who wrote this one before you use it",
    )


def _parsed(content: Any) -> dict[str, Tensor]:
    if content["version"] != VERSION:
        raise _Malformed(f"version {content['version']}, and not {VERSION}")
    files = [_text(name) for name in content["files"]]
    return {
        name: Tensor(
            torch.Size(_numbers(one["shape"])),
            _dtype(one["dtype"]),
            [
                Chunk(_numbers(offsets), _numbers(sizes), files[_number(number)], *map(_number, (begin, length)))
                for offsets, sizes, number, begin, length in one["chunks"]
            ],
        )
        for name, one in content["tensors"].items()
    }


def _check(tensors: dict[str, Tensor], sizes: dict[str, int], is_part: bool) -> None:
    """Compare the chunks with the tensors and with the sizes of the files that COMMIT lists.

    `is_part`: chunks may be missing, which are on the disks of other nodes.
    """
    total = 0
    for name, tensor in tensors.items():
        elements = 0
        for chunk in tensor.chunks:
            for size, offset, whole in zip(chunk.sizes, chunk.offsets, tensor.shape, strict=True):
                if offset + size > whole:
                    raise _Malformed(f"a chunk of {name} is outside of the tensor")
            count = math.prod(chunk.sizes)
            file_bytes = sizes.get(f"{SHARDS}/{chunk.file}")
            if file_bytes is None or not wellformed.is_plain(chunk.file):
                raise _Malformed(f"COMMIT does not list {SHARDS}/{chunk.file}")
            if chunk.begin + chunk.length > file_bytes or count * tensor.dtype.itemsize > chunk.length:
                raise _Malformed(f"a chunk of {name} is larger than its part of {chunk.file}")
            elements += count
            total += chunk.length
        if elements != math.prod(tensor.shape) and not (is_part and elements < math.prod(tensor.shape)):
            raise _Malformed(f"{name} is not complete")
    if total > sum(sizes.values()):
        raise _Malformed("the chunks are larger than the files")


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _Malformed("a name is not text")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise _Malformed("a number is out of range")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) not in (list, tuple):
        raise _Malformed("a shape is not a list")
    return tuple(map(_number, values))


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, _text(name), None)
    if not isinstance(dtype, torch.dtype):
        raise _Malformed(f"unknown dtype {name}")
    return dtype


class _Plain:
    """Takes the place of every class in an old index: a record that has no methods, and runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        """Accept the arguments of any class; what is needed comes as state."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)
        else:  # TensorProperties
            self.state = state


_RECORDS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "Path")),
}
"""Everything that an old index consists of, besides shapes and dtypes. BytesStorageMetadata, a pickle, is not."""


class _OldIndex(pickle.Unpickler):
    """Reads the pickle of torch.distributed.checkpoint as plain records."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what takes the place of a class."""
        if (module, name) in _RECORDS:
            return _Plain
        if (module, name) == ("torch", "Size"):
            return _size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Malformed(f"it holds {module}.{name}, which is not a part of an index")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse what is stored elsewhere."""
        raise _Malformed("it refers to something else")


def _size(values: Any = ()) -> tuple[int, ...]:
    return _numbers(values)


def _read_old(file: Path) -> dict[str, Tensor]:
    if file.stat().st_size > _LARGEST_OLD_BYTES:
        raise _Malformed("it is too large")
    with open(file, "rb") as opened:
        try:
            root = _OldIndex(opened).load()
        except (pickle.UnpicklingError, EOFError, MemoryError, RecursionError) as error:
            raise _Malformed(f"not an index ({type(error).__name__})") from None
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, place in root.storage_data.items():
        if getattr(place, "transform_descriptors", None):
            raise _Malformed("its shards are compressed or encrypted")
        places[_text(index.fqn), _numbers(index.offset)] = place
    return {_text(name): _old_tensor(name, one, places) for name, one in root.state_dict_metadata.items()}


def _old_tensor(name: str, one: Any, places: dict[tuple[str, tuple[int, ...]], Any]) -> Tensor:
    dtype = one.properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise _Malformed(f"{name} has no dtype")
    chunks = []
    for chunk in one.chunks:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        place = places[name, offsets]
        file, begin, length = _text(place.relative_path), _number(place.offset), _number(place.length)
        chunks.append(Chunk(offsets, sizes, file, begin, length))
    return Tensor(torch.Size(_numbers(one.size)), dtype, chunks)
