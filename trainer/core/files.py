"""Atomic file writes and heartbeat files.

A reader, including one on NFS, sees either the old or the new content. For heartbeats it can detect a partial write.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from trainer.core.errors import UserError
from trainer.core.secrets import mask

_CHECKSUM = ', "crc32": '
_LIVE_BYTES = 1024
"""Heartbeat files are padded to a multiple of this, so that the next content usually has the same length."""
_LARGEST_HEARTBEAT = 1024**2
_READS, _READ_AGAIN_S = 3, 0.002
MOST_BYTES = 16 * 1024**2
"""Largest record that is read. The largest that is written, the events of a long run, has a few MB."""
_LEAST_BYTES = 64 * 1024
"""A file system with less than this left cannot take the records of an attempt."""
_DEEPEST = 64
"""Nesting of JSON that is read; records have five levels at most."""


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file atomically: temporary file in the same folder, fsync, rename, fsync of the folder.

    The file is private to the user (0600). Secrets of the environment are masked in text (`secrets.py`).

    Args:
        path: The file.
        content: Its whole content.
        durable: False: do not wait for the disk. After a crash of the machine the file may have any content or none.
    """
    data = mask(content).encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_new(path: Path, content: str) -> bool:
    """Create a file atomically unless it exists, and return whether it was created."""
    temporary = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    write_atomic(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_live(path: Path, content: dict[str, Any]) -> None:
    """Overwrite a heartbeat file with a JSON object in place.

    For files that one thread of a process rewrites every second. This takes a sixth of the time of creating and
    renaming a file; on a cluster every rank saves that time on the file server too.

    The content ends with a CRC-32 of itself, by which `read_live` detects a partial write, and with blanks up to the
    current length of the file, so that one write is enough. Nothing is flushed: after a crash of the machine the file
    may have any content or none.

    Raises:
        OSError: If the content could not be written completely.
    """
    text = json.dumps(content)
    data = f"{text[:-1]}{_CHECKSUM}{zlib.crc32(text.encode())}}}".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        length = max(-(-len(data) // _LIVE_BYTES) * _LIVE_BYTES, os.fstat(descriptor).st_size)
        if os.pwrite(descriptor, data.ljust(length), 0) < len(data):
            raise OSError(errno.ENOSPC, "incomplete write", str(path))
    finally:
        os.close(descriptor)


def require_utf8(*paths: Path) -> None:
    """Check that records, which are UTF-8, can name these paths.

    Raises:
        UserError: A name has other bytes.
    """
    for path in paths:
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            raise UserError(f"{path.absolute()}: a name that is not UTF-8", "rename the folder") from None


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_space_on(folder: Path) -> str | None:
    """Return a sentence if the file system of a folder is full; None if it is not, or if that is not known.

    A process that a full disk has ended may have been unable to record why.
    """
    try:
        filesystem = os.statvfs(folder)
    except OSError:
        return None
    is_full = filesystem.f_blocks and filesystem.f_bavail * filesystem.f_frsize < _LEAST_BYTES
    if is_full or (filesystem.f_files and not filesystem.f_favail):
        return f"No space left on the file system of {folder}"
    return None


def append_line(path: Path, text: str) -> None:
    """Append one line with a single write, which O_APPEND makes atomic among the processes of one machine.

    Secrets of the environment are masked (`secrets.py`). A last line that a crash or a full disk has cut short gets its
    end first, so that it takes no other line with it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" * is_cut + mask(text).encode() + b"\n")
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for a writer as the opening of a FIFO does.

    Raises:
        OSError: There is no such file, it cannot be read, or it is a folder, FIFO, socket or device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, and of the links to folders.

    An entry that somebody else has put there must not hide the others: a link to itself, or into a closed folder, is
    not listed.

    Raises:
        OSError: `folder` cannot be read.
    """
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if is_folder(entry)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or leads to one; what cannot be examined is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_bytes(path: Path, most: int = MOST_BYTES, *, end: bool = False) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        most: The largest number of bytes to read.
        end: Of a larger file return the last `most` bytes.

    Raises:
        OSError: As `open_regular`, or the file is larger and `end` is false.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if end:
            file.seek(max(0, size - most))
            return file.read(most) or b""
        data = b"" if size > most else file.read(most + 1) or b""
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20} MB", str(path))
    return data


def read_text(path: Path, most: int = MOST_BYTES, *, errors: str = "strict") -> str:
    """Return the text of a regular file in UTF-8. Raises OSError as `read_bytes` does, and UnicodeDecodeError."""
    return read_bytes(path, most).decode(errors=errors)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text that is not nested deeply.

    Raises:
        ValueError: It is not JSON, or nested so deeply that a later walk over the value could exhaust the stack.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") <= _DEEPEST:
        return content
    level = [content]
    for _ in range(_DEEPEST):
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


def read_json(path: Path, default: Any = None) -> Any:
    """Return the content of a JSON file, or `default` if the file does not exist.

    Raises:
        UserError: If the file cannot be read or is not valid JSON.
    """
    try:
        return parse_json(read_text(path))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        fix = "restore it from a backup, or remove it; the information it holds about the run is then lost"
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is damaged: {reason}", fix) from None


def read_live(path: Path) -> dict[str, Any]:
    """Return the content of a heartbeat file, or an empty dict if it cannot be read.

    A partial write (wrong checksum) is read again, up to three times. A file without a checksum was written by an
    older version and is accepted.
    """
    for attempt in range(_READS):
        if attempt:
            time.sleep(_READ_AGAIN_S)
        try:
            text, mark, end = read_text(path, _LARGEST_HEARTBEAT).rstrip().rpartition(_CHECKSUM)
            if not mark:
                return dict(parse_json(end))
            if int(end[:-1]) == zlib.crc32(f"{text}}}".encode()):
                return dict(parse_json(f"{text}}}"))
        except OSError:
            return {}
        except (ValueError, TypeError):
            continue
    return {}
