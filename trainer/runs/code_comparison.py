"""Compare the frozen code of runs, file by file."""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trainer.core.files import open_regular, read_text
from trainer.runs.directory import RunDirectory

_FOLDERS = ("code", "imports")
_MOST_BYTES, _MOST_LINES = 1_000_000, 5_000
"""A larger file gets no diff, whose time grows with the square of the length."""
_MOST_HASHED = 200 * 1024**2
"""A snapshot has no larger file (`code_snapshot.LARGEST_EXTENSION_BYTES`)."""
_BLOCK = 1 << 20


def code_files(run: RunDirectory) -> dict[str, str]:
    """Return a short hash of each frozen file by its path in the run directory; a link has its target instead."""
    files = {}
    for path in _walk(run.path, [run.path / name for name in _FOLDERS]):
        try:
            files[path.relative_to(run.path).as_posix()] = _content(path)
        except OSError as error:
            files[path.relative_to(run.path).as_posix()] = f"not readable: {error.strerror}"
    return files


def diff_of(name: str, first: RunDirectory, second: RunDirectory) -> str:
    """Return the unified diff of a file of two runs, or a sentence if it has none."""
    texts = [_lines(run.path / name) for run in (first, second)]
    if None in texts:
        return "not text, or too long for a diff"
    before, after = ([] if text is None else text for text in texts)
    labels = f"{first.path.name}/{name}", f"{second.path.name}/{name}"
    return "\n".join(difflib.unified_diff(before, after, labels[0], labels[1], lineterm=""))


def _walk(root: Path, folders: list[Path]) -> Iterator[Path]:
    """Yield files and links, and no Python caches. Links are not followed."""
    for folder in folders:
        if not folder.is_symlink():
            for where, names, files in os.walk(folder):
                linked = [name for name in names if os.path.islink(os.path.join(where, name))]
                names[:] = sorted(name for name in names if name != "__pycache__" and name not in linked)
                yield from (Path(where, name) for name in sorted([*linked, *files]))


def _content(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(status.st_mode):
        return "not a file"
    if status.st_size > _MOST_HASHED:
        return f"{status.st_size} bytes, too large to compare"
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()[:12]


def _lines(path: Path) -> list[str] | None:
    """Return the lines of a text; empty if there is no such file, None if it has no diff."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return [f"link to {os.readlink(path)}"]
        lines = read_text(path, _MOST_BYTES).split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError):
        return None
    return lines if len(lines) <= _MOST_LINES else None
