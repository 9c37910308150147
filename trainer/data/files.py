"""Text files, and which of them are held out."""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.core.errors import UserError
from trainer.data import locations

_log = logging.getLogger(__name__)

Item = TypeVar("Item")

SPLITS = ("train", "val", "test")
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class TextFile:
    """A readable file: UTF-8, not empty, no NUL bytes, and no copy of an earlier one."""

    name: str
    """Path below the root, with forward slashes."""
    text: bytes


def standard_library() -> Path:
    """The sources of the running Python: about 10 MB of real text that every machine has."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_folder(root: Path, patterns: Sequence[str]) -> list[TextFile]:
    """The files below `root` (or `root` itself) whose name fits one of `patterns`, in the order of their names.

    What is not text is left out, counted and named in the log: a picture among the texts is no reason to stop,
    but must not pass unseen. Raises UserError where nothing is left.
    """
    found, skipped = [], []
    seen: set[bytes] = set()
    for path in _paths(root, patterns):
        name = path.relative_to(root if root.is_dir() else root.parent).as_posix()
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        reason = "a copy" if digest in seen else not_text(text)
        if reason:
            skipped.append(f"{name} ({reason})")
        else:
            seen.add(digest)
            found.append(TextFile(name, text))
    if skipped:
        _log.info("%d of %d files left out: %s", len(skipped), len(skipped) + len(found), ", ".join(skipped[:20]))
    if not found:
        raise UserError(f"no text files in {root} fit {', '.join(patterns)}", "set data.root or data.patterns")
    return found


def split_files(files: Sequence[TextFile], held_out: float) -> dict[str, list[TextFile]]:
    """Whole files to train, val and test; see `split_by_name`. Fewer than three are cut, 90 / 5 / 5 %."""
    return _cut(files) if len(files) < len(SPLITS) else split_by_name(files, lambda file: file.name, held_out)


def split_by_name(items: Sequence[Item], name: Callable[[Item], str], held_out: float) -> dict[str, list[Item]]:
    """At least three items to train, val and test; `held_out` is the fraction of each of the last two.

    By the hash of the name, so that a new item does not move the others. A part that gets none takes the item
    that is nearest to it.
    """
    ranked = sorted(items, key=lambda item: _place(name(item)))
    places = [_place(name(item)) for item in ranked]
    tests = max(1, sum(place < held_out for place in places))
    vals = max(1, sum(held_out <= place < 2 * held_out for place in places))
    vals = min(vals, len(ranked) - tests - 1)
    if vals < 1:
        raise UserError(f"data.held_out={held_out} leaves nothing to train on", "use a smaller data.held_out")
    parts = {"test": ranked[:tests], "val": ranked[tests : tests + vals], "train": ranked[tests + vals :]}
    return {split: sorted(parts[split], key=name) for split in SPLITS}


def content_key(files: Sequence[TextFile], *settings: object) -> str:
    """A name for what is made of these files with these settings."""
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


def not_text(text: bytes) -> str:
    if not text:
        return "empty"
    if b"\0" in text:
        return "binary"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def _place(name: str) -> float:
    """A point in [0, 1) that belongs to the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56


def _cut(files: Sequence[TextFile]) -> dict[str, list[TextFile]]:
    parts: dict[str, list[TextFile]] = {split: [] for split in SPLITS}
    for file in files:
        text = file.text.decode()
        first, second = len(text) * 9 // 10, len(text) * 19 // 20
        for split, piece in zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True):
            parts[split].append(TextFile(file.name, piece.encode()))
    return parts
