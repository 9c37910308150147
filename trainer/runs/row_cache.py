"""Keep rows of ended runs outside the run directories, so that a list of runs opens one file for all of them.

    $XDG_CACHE_HOME/trainer/rows-HASH.jsonl    one file per folder of runs; its name is a hash of the folder's path
        {"version": 2, "release": "0.2.0", "root": "/home/me/runs"}
        {"folder": "mlp-k3v9abcd", "seen": ...}    three lines per run: when its row is true, and the sealed summary
        {"release": "0.2.0", ..., "facts": ...,    with the facts, which are parsed,
        "config": ..., "ranges": ..., ...}         and the rest, which is parsed only when it is needed

Everything in it can be derived anew: what cannot be used is left out. Several processes may write; the file of the last
one counts, and what it lacks is read from the run directories again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.core.files import parse_json, read_bytes, write_atomic
from trainer.runs.seal import Sealed, sealed_from

VERSION = 2
MOST_BYTES = 256 << 20
"""Largest file. Rows beyond it are not kept: about 50,000."""
MOST_FILES = 50
"""Of more folders of runs the rows that were not written for the longest time are deleted."""
_PREFIX, _SUFFIX = "rows-", ".jsonl"


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
        self._folder, self._root = str(root), os.path.realpath(root)
        self._heads: dict[str, bytes] = {}
        """The first lines of the rows that were read, by the names of their run directories."""

    def load(self) -> dict[str, Sealed]:
        """Return the rows by the names of the run directories; empty if there is no file that can be used."""
        try:
            lines = read_bytes(self._path(), MOST_BYTES).split(b"\n")
            header = parse_json(lines[0].decode())
            if header != self._header():
                return {}
        except (OSError, ValueError, RuntimeError):
            return {}
        rows = {}
        for head, facts, rest in zip(lines[1::3], lines[2::3], lines[3::3], strict=False):
            if (parsed := _parsed(head)) is not None:
                name, seen = parsed
                row = sealed_from(facts + b"\n" + rest, seen, f"{self._folder}{os.sep}{name}")
                if row is not None:
                    rows[name], self._heads[name] = row, head
        return rows

    def save(self, rows: Mapping[str, Sealed], changed: set[str]) -> None:
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


def _head(name: str, row: Sealed) -> bytes:
    return json.dumps({"folder": name, "seen": row.seen}).encode()


def _parsed(head: bytes) -> tuple[str, dict[str, list[int]]] | None:
    """Return the parts of the line before a sealed summary; None if it is damaged."""
    try:
        content = parse_json(head.decode())
        name, seen = content["folder"], content["seen"]
        return (name, seen) if isinstance(name, str) and isinstance(seen, dict) else None
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
