"""Record which files and folders the section `data` names, and whether they are still what they were."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_ENTRIES = 10_000
"""A larger folder is counted up to here."""
_MOST_VALUES = 64
_NAMED_AS_PATH = ("path", "dir", "folder", "root", "file")


def data_files(data: Any, cwd: Path) -> dict[str, dict[str, Any]]:
    """Return facts of each file and folder in `data` by key: its absolute path, size, number of entries, time.

    Reads no content. A value that names nothing on this machine is left out: it need not be a path.

    Args:
        data: The section `data` of a configuration.
        cwd: Folder that relative paths refer to.
    """
    found = {}
    for key, value in list(_texts("data", data))[:_MOST_VALUES]:
        if "/" in value or key.rpartition(".")[2].rpartition("_")[2] in _NAMED_AS_PATH:
            facts = facts_of(Path(os.path.abspath(cwd / Path(value).expanduser())))
            if facts is not None:
                found[key] = facts
    return found


def facts_of(path: Path) -> dict[str, Any] | None:
    """Return the facts of a file or folder; None if it does not exist."""
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return {"path": str(path), "bytes": status.st_size, "modified": round(status.st_mtime, 3)}
        entries = sum(1 for _, _ in zip(os.scandir(path), range(_MOST_ENTRIES), strict=False))
    except (OSError, ValueError):
        return None
    return {"path": str(path), "entries": entries, "modified": round(status.st_mtime, 3)}


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield each text at any depth with its key, except URLs."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "_target_":
                yield from _texts(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(f"{key}[{index}]", inner)
    elif isinstance(value, str) and value and "://" not in value:
        yield key, value
