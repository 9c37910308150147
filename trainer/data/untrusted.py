"""Read files of unknown origin: regular files only, up to a limit, and JSON of the expected types. Imports no torch.

A folder of data may hold named pipes, which block whoever opens them, devices without an end, sparse files, and files
that unpack to more than the memory.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainer.core.errors import UserError
from trainer.core.host_memory import available_bytes
from trainer.core.text import one_line

_UNKNOWN_MEMORY = 8 * 2**30
"""Bytes of memory that are assumed where the system does not tell."""
_BLOCK_BYTES = 2**20
JSON_BYTES = 64 * 2**20
"""Maximum size of a JSON file that describes data."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never blocks.

    Raises:
        ValueError: It is a named pipe, a device, a socket or a folder.
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return os.fdopen(descriptor, "rb")


def limit_bytes(given: int | None = None) -> int:
    """Return how much one file may unpack to: `given`, or half of the memory that is available."""
    return given or (available_bytes() or _UNKNOWN_MEMORY) // 2


def require_within(source: object, size: int, max_bytes: int | None) -> None:
    """Raise UserError if `size` bytes are more than `max_bytes`; None: half of the memory that is available."""
    limit = limit_bytes() if max_bytes is None else max_bytes
    if size > limit:
        problem = f"{shown(source)} holds {size:,} bytes unpacked; {limit:,} are left of the limit"
        fix = "remove it; or set data.max_bytes=BYTES, by default half of the free memory"
        raise UserError(problem, fix)


def has_hole(file: BinaryIO) -> bool:
    """Return whether a file is sparse: its holes read as NUL bytes, and may be larger than any disk."""
    size = os.fstat(file.fileno()).st_size
    try:
        return os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size
    except OSError:  # the file system does not know
        return False
    finally:
        file.seek(0)


def unpacked(file: BinaryIO) -> BinaryIO:
    """Return what is in a gzip file as a stream, of which no more is unpacked than is read."""
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def read_exactly(stream: BinaryIO, size: int) -> bytearray:
    """Return the next `size` bytes, or raise EOFError if there are fewer; takes memory for those that there are."""
    content = bytearray()
    while len(content) < size and (block := stream.read(min(_BLOCK_BYTES, size - len(content)))):
        content += block
    if len(content) < size:
        raise EOFError(f"{len(content):,} bytes where {size:,} were promised")
    return content


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: It cannot be read, is larger than `JSON_BYTES`, or no JSON object; with `fix`.
    """
    try:
        with open_regular(path) as file:
            text = file.read(JSON_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be read: {error}", fix) from None
    return object_of(text, path, fix)


def object_of(text: bytes, source: object, fix: str) -> dict[str, Any]:
    """Return the JSON object in a text that was read from `source`; raises as `read_object` does."""
    try:
        if len(text) > JSON_BYTES:
            raise ValueError(f"larger than {JSON_BYTES:,} bytes")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(source)} is not valid JSON: {error}", fix) from None
    if not isinstance(content, dict):
        raise UserError(f"{shown(source)} holds no JSON object", fix)
    return content


def natural(content: Mapping[str, Any], source: object, *keys: str, largest: int = 2**62) -> int:
    """Return the integer in `0..largest` under nested keys of a JSON object, or raise UserError."""
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if type(value) is not int or not 0 <= value <= largest:
        problem = f"{shown(source)}: {'.'.join(keys)} is {shown(repr(value)[:60])}, not an integer in 0..{largest}"
        raise UserError(problem, "write the data again")
    return value


def inside(root: Path, name: str) -> Path:
    """Return `root / name`, for a name that was read from data.

    Raises:
        ValueError: The path is outside of the root.
    """
    path = Path(os.path.normpath(root / name)) if "\0" not in name else None
    if path is None or not path.is_relative_to(os.path.normpath(root)):
        raise ValueError(f"path {shown(name)} is outside of {shown(root)}")
    return path


def shown(value: object) -> str:
    r"""Return a name as one line of printable text; other characters are escaped, such as `\n` and `\x1b`."""
    return one_line(str(value))
