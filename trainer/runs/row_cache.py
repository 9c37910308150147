"""Keep rows of ended runs outside the run directories, so that a list of runs opens one file for all of them.

    $XDG_CACHE_HOME/trainer/rows-HASH.jsonl    one file per folder of runs; its name is a hash of the folder's path
        {"version": 1, "release": "0.2.0", "root": "/home/me/runs"}
        {"folder": "mlp-k3v9abcd", "seen": ..., "is_over": true, "facts": ...}    two lines per run; the second is the
        {"folder": "mlp-k3v9abcd", "written": ..., ...}       sealed summary, which is parsed only when it is needed

Everything in it can be derived anew: what cannot be used is left out. Several processes may write; the file of the last
one counts, and what it lacks is read from the run directories again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.core.files import parse_json, read_bytes, write_atomic
from trainer.runs.facts import Facts, is_well_formed

VERSION = 1
MOST_BYTES = 256 << 20
"""Largest file. Rows beyond it are not kept: about 50,000."""
MOST_FILES = 50
"""Of more folders of runs the rows that were not written for the longest time are deleted."""
_PREFIX, _SUFFIX = "rows-", ".jsonl"


@dataclass(frozen=True)
class CachedRow:
    """What is known about a run that ended."""

    seen: dict[str, list[int]]
    """The signatures of files and folders under which it is true."""
    is_over: bool
    facts: Facts
    content: bytes
    """The sealed summary, as `seal.content_of` returns it."""


def folder() -> Path:
    """Return the folder of caches."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "trainer"


class RowCache:
    """The rows of one folder of runs.

    Args:
        root: The folder of runs.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._heads: dict[str, bytes] = {}
        """The first lines of the rows that were read, by the names of their run directories."""

    def load(self) -> dict[str, CachedRow]:
        """Return the rows by the names of the run directories; empty if there is no file that can be used."""
        try:
            lines = read_bytes(self._path(), MOST_BYTES).split(b"\n")
            header = parse_json(lines[0].decode())
            if header != self._header():
                return {}
        except (OSError, ValueError, RuntimeError):
            return {}
        rows = {}
        for head, content in zip(lines[1::2], lines[2::2], strict=False):
            read = _parsed(head)
            if read is not None:
                name, seen, is_over, facts = read
                rows[name] = CachedRow(seen, is_over, facts, content)
                self._heads[name] = head
        return rows

    def save(self, rows: Mapping[str, CachedRow], changed: set[str]) -> None:
        """Replace the file. What cannot be written is not kept.

        Args:
            rows: All rows, by the names of the run directories.
            changed: The names of those that are new since `load`.
        """
        parts, size = [json.dumps(self._header()).encode()], 0
        for name, row in rows.items():
            head = self._heads.get(name)
            if head is None or name in changed:
                head = self._heads[name] = _head(name, row)
            size += len(head) + len(row.content) + 2
            if size > MOST_BYTES - (1 << 16):
                break
            parts += [head, row.content.rstrip()]
        try:
            path = self._path()
            _make_private(path.parent)
            write_atomic(path, b"\n".join(parts).decode(), durable=False)
            _delete_oldest(path.parent)
        except (OSError, RuntimeError):  # no home, a full disk, a folder of somebody else
            return

    def _header(self) -> dict[str, Any]:
        return {"version": VERSION, "release": __version__, "root": self._root}

    def _path(self) -> Path:
        name = hashlib.sha256(os.fsencode(self._root)).hexdigest()[:16]
        path = folder() / f"{_PREFIX}{name}{_SUFFIX}"
        _require_private(path.parent)
        return path


def _head(name: str, row: CachedRow) -> bytes:
    content = {"folder": name, "seen": row.seen, "is_over": row.is_over, "facts": row.facts}
    return json.dumps(content).encode()


def _parsed(head: bytes) -> tuple[str, dict[str, list[int]], bool, Facts] | None:
    """Return the parts of a first line; None if it is damaged."""
    try:
        content = parse_json(head.decode())
        name, seen, is_over, facts = content["folder"], content["seen"], content["is_over"], content["facts"]
        usable = isinstance(name, str) and isinstance(seen, dict) and isinstance(is_over, bool)
        return (name, seen, is_over, facts) if usable and is_well_formed(facts) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _require_private(path: Path) -> None:
    """Raise PermissionError if others could have put rows into the folder."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path} is not a folder of your own that only you may write to")


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    _require_private(path)


def _delete_oldest(path: Path) -> None:
    """Delete what is beyond `MOST_FILES`, and temporary files that a killed process has left."""
    with os.scandir(path) as entries:
        found = [(entry.stat(follow_symlinks=False).st_mtime, entry.path, entry.name) for entry in entries]
    ours = sorted((one for one in found if one[2].startswith((_PREFIX, f".{_PREFIX}"))), reverse=True)
    for _, doomed, _ in ours[MOST_FILES:]:
        Path(doomed).unlink(missing_ok=True)
