"""Read what torch.save wrote, as data: tensors and plain values. No class of the file is ever called.

torch.load with `weights_only` reads a pickle by a closed list of types. Its advice for other files, to turn that off,
is not repeated here: whoever follows it executes the file.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from trainer.checkpoint.wellformed import BadCheckpoint, shown

_NAMED = re.compile(r"GLOBAL ([\w.]+)|unsupported class ([\w.]+)")


def load(path: Path, map_location: Any = "cpu", mapped: bool = False) -> Any:
    """Read a file that torch.save wrote.

    Args:
        path: The file.
        map_location: Device of the tensors, as in torch.load.
        mapped: Memory-map the tensors, if the format allows it: they stay on disk until they are read.

    Raises:
        OSError: The file cannot be opened.
        BadCheckpoint: torch.save did not write it, or it holds more than data.
    """
    require_regular(path)
    with open(path, "rb") as opened:
        is_zip = _check_zip(path, opened)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped and is_zip)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise bad(str(path), error) from None


def load_part(opened: BinaryIO, begin: int, length: int) -> torch.Tensor:
    """Return the tensor that torch.save wrote into a part of a file.

    Raises:
        BadCheckpoint: There is something else.
    """
    part: Any = _Part(opened, begin, length)
    try:
        _check_zip(Path(opened.name), part)
        part.seek(0)
        tensor = torch.load(part, map_location="cpu", weights_only=True)
    except (OSError, BadCheckpoint):
        raise
    except Exception as error:
        raise bad(opened.name, error) from None
    if not isinstance(tensor, torch.Tensor):
        raise BadCheckpoint(f"{opened.name} holds a {type(tensor).__name__} and not a tensor", "use another checkpoint")
    return tensor


@contextmanager
def without_crc() -> Iterator[None]:
    """Make torch.save compute no CRC, which takes half as long as the checksum of the file and is never compared.

    Only programs that read ZIP archives would. A file of shards is no archive: it has one for each tensor.
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Part(io.RawIOBase):
    """A part of an open file as a file, without a copy of it."""

    def __init__(self, opened: BinaryIO, begin: int, length: int) -> None:
        super().__init__()
        self._opened, self._begin, self._length, self._at = opened, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._opened.seek(self._begin + self._at)
        count: int = self._opened.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


def require_regular(path: Path) -> None:
    """Check that the path names a file, also by a link: a FIFO would block, a device has no end.

    Raises:
        OSError: It does not exist.
        BadCheckpoint: It is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadCheckpoint(f"{path} is not a regular file", "name a file with weights, or a checkpoint folder")


def bad(name: str, error: Exception) -> BadCheckpoint:
    """Return an exception of torch.load as an error that states what is wrong with the file."""
    text = str(error)
    named = _NAMED.search(text)
    if named:
        reason = f"it holds {named[1] or named[2]}, which is code and not data"
    elif "weights_only" in text or "Weights only" in text:
        reason = "it holds objects, which are code and not data"
    else:
        reason = f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0]}"
    return BadCheckpoint(
        f"{name} is not read: {shown(reason)}",
        "such a file can execute anything; take the weights from its author as .safetensors",
    )


def _check_zip(path: Path, opened: BinaryIO) -> bool:
    """Return whether the file is a ZIP archive, the format since torch 1.6.

    Raises:
        BadCheckpoint: What it unpacks to is larger than itself: torch.save compresses nothing.
    """
    if not zipfile.is_zipfile(opened):
        return False
    size = opened.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(opened) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise bad(str(path), error) from None
    if not stored or unpacked > size:
        raise BadCheckpoint(f"{path} is compressed: {unpacked} bytes in {size}", "torch.save writes no such file")
    return True
