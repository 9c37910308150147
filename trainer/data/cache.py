"""Prepared data, kept in folders that are complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/trainer`, or `~/.cache/trainer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainer"


def prepared(folder: Path, prepare: Callable[[Path], None]) -> Path:
    """`folder`, filled by `prepare(empty folder)` unless it is there.

    It is filled aside and renamed, so that a killed process leaves nothing half made. Of two that prepare the
    same at once, the first wins and the other takes its result.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        prepare(aside)
        aside.chmod(0o755)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
