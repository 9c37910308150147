"""Writing files so that a reader, also on NFS, sees the old content or the new, never half of it."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any


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


def write_live(path: Path, content: str) -> None:
    """As `write_atomic`, in half its time, for what is written anew every second by one thread of a process: nothing is
    flushed, so that a crash of the machine may leave the old content or an empty file."""
    aside = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}"
    try:
        with open(aside, "w", opener=_private) as file:
            file.write(content)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
    """The content of a JSON file; `default` where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default


def read_live(path: Path) -> dict[str, Any]:
    """What `write_live` wrote; empty where there is nothing that can be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
