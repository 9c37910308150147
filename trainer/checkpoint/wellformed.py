"""What a checkpoint may consist of: regular files inside its folder, under plain names, of the sizes that it states.

A checkpoint may come from somebody else. Before any of its files is opened, this is checked, so that it can neither
lead to another file, nor keep a reader waiting at a FIFO, nor be read without an end. This module does not import
torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.core.errors import UserError

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags of open(2) with which neither a link is followed nor a FIFO waited for."""
LARGEST_JSON_BYTES = 1 << 30
"""An index of the shards of 1,000 tensors on 1,000 ranks has about 60 MB."""
_PART = re.compile(r"[A-Za-z0-9_.+=@,-]{1,255}")
"""Part of the path of a file in a checkpoint."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 2**63 - 1
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class BadCheckpoint(UserError):
    """A checkpoint is malformed: it holds something that this program does not write. No restart helps."""


class _File(Protocol):
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class _Commit(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def files(self) -> Mapping[str, _File]: ...


def read_json(folder: Path, relative: str) -> Any:
    """Return the content of a JSON file of a checkpoint.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is not JSON.
        BadCheckpoint: It is not a regular file, too large, or nested too deeply.
    """
    try:
        descriptor = os.open(folder / relative, READ)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise malformed(folder, f"{relative}: a symbolic link or a socket, not a regular file") from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise malformed(folder, _not_regular(relative, found.st_mode))
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > LARGEST_JSON_BYTES:
            raise malformed(folder, f"{relative}: {found.st_size} bytes, more than any checkpoint needs")
        content = file.read(LARGEST_JSON_BYTES)
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason}") from error
    except RecursionError:
        raise malformed(folder, f"{relative}: nested too deeply") from None


def size_of(folder: Path, relative: str) -> int:
    """Return the size in bytes of a file of a checkpoint.

    Raises:
        OSError: It does not exist.
        BadCheckpoint: It is not a regular file, or in a folder that is a symbolic link.
    """
    inner = relative.rpartition("/")[0]
    if inner:
        mode = os.lstat(folder / inner).st_mode
        if not stat.S_ISDIR(mode):
            raise malformed(folder, f"{inner}: {_KINDS.get(stat.S_IFMT(mode), 'a file')}, not a folder")
    found = os.lstat(folder / relative)
    if not stat.S_ISREG(found.st_mode):
        raise malformed(folder, _not_regular(relative, found.st_mode))
    return found.st_size


def problems_of_commit(content: _Commit, name: str) -> Iterator[str]:
    """Yield the values of COMMIT, which has the given name, that no checkpoint has."""
    for key, value, least in (
        ("step", content.step, 0),
        ("epoch", content.epoch, 0),
        ("world_size", content.world_size, 1),
    ):
        if not least <= value <= _LARGEST:
            yield f"{key} is out of range"
    for relative, file in content.files.items():
        if not is_plain(relative) or relative == name:
            yield f"{shown(relative)} is not the name of a file in a checkpoint"
        elif not 0 <= file.bytes <= _LARGEST or not _SHA256.fullmatch(file.sha256):
            yield f"{relative} has no size or checksum"


def is_plain(relative: str) -> bool:
    """Return whether the path is a plain name, or one in a folder with a plain name."""
    parts = relative.split("/")
    return len(parts) <= 2 and all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)


def malformed(path: Path, problem: str) -> BadCheckpoint:
    """Return the error for a checkpoint. Its message is bare, because callers list it after the checkpoint's name."""
    return BadCheckpoint(problem, f"find out who wrote {shown(str(path))} before you use it")


def shown(text: str) -> str:
    """Return a text from a file on one line and without control characters, shortened."""
    return ascii(text[:200])[1:-1]


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _not_regular(relative: str, mode: int) -> str:
    return f"{relative}: {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"
