"""Prepared data, cached in folders that are either complete or absent."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainer.core.paths import cache_root

__all__ = ["cache_root", "prepared"]


def prepared(folder: Path, prepare: Callable[[Path], None]) -> Path:
    """Return `folder`, after filling it with `prepare(empty folder)` if it does not exist.

    A temporary folder is filled and then renamed, so a killed process leaves nothing half made. When two processes
    prepare the same folder at once, the first wins and the other uses its result. Folders that are made have mode 0700:
    what is in them is as private as the data.
    """
    if folder.is_dir():
        return folder
    _make_private(folder.parent)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        prepare(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _make_private(folder: Path) -> None:
    """Make a folder and those above it; `Path.mkdir` would give the latter the mode of the umask."""
    for one in (*reversed(folder.parents), folder):
        if not one.is_dir():
            one.mkdir(mode=0o700, exist_ok=True)
