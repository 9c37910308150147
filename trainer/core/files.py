"""Writing files so that a reader, also on NFS, sees the old content or the new, or knows that it saw half of it."""

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
"""A live file is padded to a multiple of it, so that the next content is most often as long."""
_READS, _READ_AGAIN_S = 3, 0.002


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write aside in the same folder, fsync, rename, fsync the folder. The file is private to the user (0600)."""
    data = content.encode() if isinstance(content, str) else content
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_new(path: Path, content: str) -> bool:
    """Write a file that is whole from its first moment, unless there is one; returns whether it was written."""
    aside = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    write_atomic(aside, content)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return True


def write_live(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object in place: for what is written anew every second by one thread of a process, in a sixth of the
    time of a file that is made and renamed, which on a cluster also is its server's time, from every rank.

    It ends with a checksum of itself, by which `read_live` knows half of it, and blanks up to the length that the file
    has already, so that one write is all. Nothing is flushed: a crash of the machine may leave any content or none.
    """
    text = json.dumps(content)
    data = f"{text[:-1]}{_CHECKSUM}{zlib.crc32(text.encode())}}}".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        length = max(-(-len(data) // _LIVE_BYTES) * _LIVE_BYTES, os.fstat(descriptor).st_size)
        if os.pwrite(descriptor, data.ljust(length), 0) < len(data):
            raise OSError(errno.ENOSPC, "not written whole", str(path))
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, text: str) -> None:
    """Append one line by one write, which O_APPEND makes atomic among the processes of a machine."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, text.encode() + b"\n")
    finally:
        os.close(descriptor)


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a JSON file; `default` where there is none. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default
    except ValueError as error:
        fix = "restore it from a backup, or remove it: what it says of the run is lost then"
        raise UserError(f"{path} is damaged: {error}", fix) from None


def read_live(path: Path) -> dict[str, Any]:
    """What `write_live` wrote; empty where there is nothing that can be read. Met while it is written it is read again;
    without a checksum it is by an older version."""
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
