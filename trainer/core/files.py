"""Atomic file writes and heartbeat files.

A reader, including one on NFS, sees either the old or the new content. For heartbeats it can detect a partial write.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError

_CHECKSUM = ', "crc32": '
_LIVE_BYTES = 1024
"""Heartbeat files are padded to a multiple of this, so that the next content usually has the same length."""
_READS, _READ_AGAIN_S = 3, 0.002


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: temporary file in the same folder, fsync, rename, fsync of the folder.

    The file is private to the user (0600).
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


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


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, text: str) -> None:
    """Append one line with a single write, which O_APPEND makes atomic among the processes of one machine."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, text.encode() + b"\n")
    finally:
        os.close(descriptor)


def read_json(path: Path, default: Any = None) -> Any:
    """Return the content of a JSON file, or `default` if the file does not exist.

    Raises:
        UserError: If the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default
    except ValueError as error:
        fix = "restore it from a backup, or remove it; the information it holds about the run is then lost"
        raise UserError(f"{path} is damaged: {error}", fix) from None


def read_live(path: Path) -> dict[str, Any]:
    """Return the content of a heartbeat file, or an empty dict if it cannot be read.

    A partial write (wrong checksum) is read again, up to three times. A file without a checksum was written by an
    older version and is accepted.
    """
    for attempt in range(_READS):
        if attempt:
            time.sleep(_READ_AGAIN_S)
        try:
            text, mark, end = path.read_text().rstrip().rpartition(_CHECKSUM)
            if not mark:
                return dict(json.loads(end))
            if int(end[:-1]) == zlib.crc32(f"{text}}}".encode()):
                return dict(json.loads(f"{text}}}"))
        except OSError:
            return {}
        except (ValueError, TypeError):
            continue
    return {}
