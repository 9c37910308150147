"""Text files, and the split into train, val and test."""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.core.errors import UserError
from trainer.data import locations
from trainer.data.untrusted import has_hole, limit_bytes, open_regular, require_within, shown

_log = logging.getLogger(__name__)

Item = TypeVar("Item")

SPLITS = ("train", "val", "test")
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class TextFile:
    """A readable file: UTF-8, not empty, no NUL bytes, and not a duplicate of another file."""

    name: str
    """Path relative to the root, with forward slashes."""
    text: bytes


def standard_library() -> Path:
    """Return the folder of the running Python's standard library: about 10 MB of real text that every machine has."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_folder(root: Path, patterns: Sequence[str], max_bytes: int | None = None) -> list[TextFile]:
    """Read the files below `root` (or `root` itself) whose name matches one of `patterns`, sorted by name.

    Files that are not text are skipped, counted and named in the log: an image among the texts is no reason to stop,
    but must not go unnoticed.

    Args:
        root: A folder or a file.
        patterns: Names of the files.
        max_bytes: Maximum bytes of all texts; None: half of the memory that is available.

    Raises:
        UserError: No file is left, or the texts are larger.
    """
    files, skipped = [], []
    seen: set[bytes] = set()
    length, limit = 0, limit_bytes(max_bytes)
    for path in _paths(root, patterns):
        name = path.relative_to(root if root.is_dir() else root.parent).as_posix()
        text = read_text(path, limit - length)
        digest = hashlib.sha256(text).digest()
        reason = "duplicate" if digest in seen else not_text(text)
        if reason:
            skipped.append(f"{shown(name)} ({reason})")
        else:
            seen.add(digest)
            length += len(text)
            files.append(TextFile(name, text))
    if skipped:
        _log.info("skipped %d of %d files: %s", len(skipped), len(skipped) + len(files), ", ".join(skipped[:20]))
    if not files:
        raise UserError(f"no text files in {root} match {', '.join(patterns)}", "set data.root or data.patterns")
    return files


def split_files(files: Sequence[TextFile], held_out: float) -> dict[str, list[TextFile]]:
    """Split whole files into train, val and test (see `split_by_name`); one or two files are cut, 90 / 5 / 5 %."""
    return _cut(files) if len(files) < len(SPLITS) else split_by_name(files, lambda file: file.name, held_out)


def split_by_name(items: Sequence[Item], name: Callable[[Item], str], held_out: float) -> dict[str, list[Item]]:
    """Split at least three items into train, val and test by the hash of their names.

    A new item does not move the others. A split that would be empty gets the item whose hash is nearest.

    Args:
        items: The items to split.
        name: Returns the name of an item.
        held_out: Fraction of the items for each of val and test.
    """
    ranked = sorted(items, key=lambda item: _hash_point(name(item)))
    points = [_hash_point(name(item)) for item in ranked]
    tests = max(1, sum(point < held_out for point in points))
    vals = max(1, sum(held_out <= point < 2 * held_out for point in points))
    vals = min(vals, len(ranked) - tests - 1)
    if vals < 1:
        raise UserError(f"data.held_out={held_out} leaves no training data", "use a smaller data.held_out")
    parts = {"test": ranked[:tests], "val": ranked[tests : tests + vals], "train": ranked[tests + vals :]}
    return {split: sorted(parts[split], key=name) for split in SPLITS}


def content_key(files: Sequence[TextFile], *settings: object) -> str:
    """Return a cache key of the contents of these files and these settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.text).digest())
    return digest.hexdigest()[:20]


def _paths(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for path in sorted(locations.text(str(root)).rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") or part in NOT_SOURCES for part in parts)
        if not hidden and path.is_file() and any(path.match(pattern) for pattern in patterns):
            yield path


def read_text(path: Path, max_bytes: int | None = None) -> bytes:
    """Return the content of a file that should hold text; of a sparse file, whose holes are NUL bytes, only one NUL.

    Raises:
        UserError: It is larger than `max_bytes` (None: half of the memory that is available), or no regular file.
    """
    try:
        with open_regular(path) as file:
            if has_hole(file):
                return b"\0"
            require_within(path, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()
    except ValueError as error:
        raise UserError(f"{shown(path)}: {error}", "remove it") from None


def not_text(text: bytes) -> str:
    """Return why `text` is not UTF-8 text; empty if it is."""
    if not text:
        return "empty"
    if b"\0" in text:
        return "binary"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def _hash_point(name: str) -> float:
    """Map a name to a point in [0, 1) by its hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56


def _cut(files: Sequence[TextFile]) -> dict[str, list[TextFile]]:
    parts: dict[str, list[TextFile]] = {split: [] for split in SPLITS}
    for file in files:
        text = file.text.decode()
        first, second = len(text) * 9 // 10, len(text) * 19 // 20
        for split, piece in zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True):
            parts[split].append(TextFile(file.name, piece.encode()))
    return parts
