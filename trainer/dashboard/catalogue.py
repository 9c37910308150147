"""The runs of all roots: read again when they are due, and told apart by what changed since a cursor."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core.errors import TrainerError
from trainer.core.files import subfolders
from trainer.dashboard.rows import table_row, unreadable_row
from trainer.launch.jobs import states_of_jobs
from trainer.runs.directory import RunDirectory
from trainer.runs.index import Index
from trainer.runs.row import Row
from trainer.runs.state import ACTIVE

ACTIVE_EVERY_S, ENDED_EVERY_S, SLURM_EVERY_S = 2.0, 30.0, 15.0
"""Seconds between two looks at an active run, at another run and at the folders, and between two questions to SLURM."""


@dataclass
class Entry:
    """A run and what is known of it."""

    key: str
    """Names the run in requests: a hash of its path, so that no request names a path."""
    run: RunDirectory
    root: int
    created: float
    row: dict[str, Any] | None = None
    """None: not read yet."""
    version: int = 0
    """The cursor at which it changed last."""

    @property
    def is_active(self) -> bool:
        """Whether it may change without a new launch."""
        return self.row is None or self.row["state"] in ACTIVE


class _Jobs:
    """Asks SLURM for the states of jobs, and repeats its answer for a while."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._states: dict[str, str] = {}

    def __call__(self, job_ids: list[str]) -> dict[str, str] | None:
        now = time.monotonic()
        due = [one for one in job_ids if now - self._asked.get(one, -math.inf) >= SLURM_EVERY_S]
        if due:
            found = states_of_jobs(due)
            if found is None:
                return None
            self._asked |= dict.fromkeys(due, now)
            for one in due:
                self._states.pop(one, None)
            self._states |= found
        return {one: self._states[one] for one in job_ids if one in self._states}

    def forget(self) -> None:
        """Ask again next time."""
        self._asked.clear()


@dataclass
class _Root:
    """A folder of runs, or one run in its folder."""

    folder: Path
    only: str | None
    """The name of the one run."""
    index: Index
    cursor: int = 0
    problems: dict[Path, str] = field(default_factory=dict)


class Catalogue:
    """All runs. `refresh` reads files and blocks: call it in a thread. All else answers from memory.

    Args:
        roots: Folders of runs, or run directories.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [Path(root).absolute() for root in roots]
        self._jobs = _Jobs()
        self._roots = [self._root(root) for root in self.roots]
        self._entries: dict[str, Entry] = {}
        self._removed: dict[str, int] = {}
        """Key to the cursor at which the run was found to be deleted."""
        self._lock, self._refreshing = threading.Lock(), threading.Lock()
        self._cursor = 0
        self._listed = self._looked = -math.inf
        self._common: dict[str, Any] | None = None
        """The configuration of the first run that was read; rows have what differs from it."""
        self._common_at = 0

    def refresh(self, now: float | None = None) -> None:
        """Read what is due. What a `Row` needs of files is read here, too."""
        now = time.monotonic() if now is None else now
        with self._refreshing:
            if now - self._looked < ACTIVE_EVERY_S:
                return
            is_full = now - self._listed >= ENDED_EVERY_S
            self._looked = now
            if is_full:
                self._listed = now
                self._list()
            for number, root in enumerate(self._roots):
                self._refresh(number, root, only_active=not is_full)

    def look(self) -> None:
        """Read the active runs at once, such as after a request to stop one."""
        self._jobs.forget()
        self._looked = self._listed = -math.inf
        self.refresh()

    def entry(self, key: str) -> Entry | None:
        """Return the run of a key; None for any other text."""
        return self._entries.get(key)

    def changes(self, since: int) -> dict[str, Any]:
        """Return the rows that changed after a cursor, and the next cursor. Since 0: all of them."""
        with self._lock:
            since = since if 0 <= since <= self._cursor else 0
            entries = sorted(self._entries.values(), key=lambda entry: (-entry.created, entry.key))
            return {
                "cursor": self._cursor,
                "reset": since == 0,
                "unread": sum(entry.row is None for entry in entries),
                "common": self._common if since < self._common_at or since == 0 else None,
                "rows": [_public(entry) for entry in entries if entry.version > since],
                "removed": [key for key, at in self._removed.items() if at > since] if since else [],
            }

    def _root(self, path: Path) -> _Root:
        only = path.name if RunDirectory(path).exists() else None
        folder = path.parent if only else path
        return _Root(folder, only, Index(folder, self._jobs, seal_runs=False))

    def _list(self) -> None:
        """Name the runs that are new before they are read, which may take a while the first time."""
        for number, root in enumerate(self._roots):
            try:
                names = [root.only] if root.only else subfolders(root.folder)
            except OSError:
                continue
            for run in (RunDirectory(root.folder / name) for name in names):
                if run.exists():
                    self._named(number, run)

    def _refresh(self, number: int, root: _Root, *, only_active: bool) -> None:
        try:
            root.index.refresh(only_active=only_active)
        except TrainerError:  # a folder that cannot be read now: a file server that is away
            return
        changes = root.index.since(root.cursor)
        root.cursor = changes.cursor
        for row in sorted(changes.rows, key=lambda row: -row.facts["created"]):
            if root.only in (None, row.path.name):
                self._take(self._named(number, RunDirectory(row.path)), row)
        for path, reason in changes.problems.items():
            if root.only in (None, path.name):
                run = RunDirectory(path)
                self._set(self._named(number, run), unreadable_row(run, reason))
        gone = [key_of(path) for path in changes.gone]
        if not only_active:  # also those that the index could never read
            gone += [one.key for one in list(self._entries.values()) if one.root == number and not one.run.exists()]
        for key in gone:
            self._remove(key)

    def _take(self, entry: Entry, row: Row) -> None:
        try:
            self._set(entry, table_row(row))
        except Exception as error:  # whatever it is, the other runs are shown
            reason = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
            self._set(entry, unreadable_row(entry.run, reason))

    def _named(self, root: int, run: RunDirectory) -> Entry:
        key = key_of(run.path)
        with self._lock:
            if key not in self._entries:
                self._entries[key] = Entry(key, run, root, run.created_at(), version=self._next())
                self._removed.pop(key, None)
            return self._entries[key]

    def _remove(self, key: str) -> None:
        with self._lock:
            if self._entries.pop(key, None):
                self._removed[key] = self._next()

    def _set(self, entry: Entry, row: dict[str, Any]) -> None:
        with self._lock:
            config = row.pop("config", {})
            if self._common is None and config:
                self._common, self._common_at = config, self._next()
            common = self._common or {}
            row["config"] = {key: value for key, value in config.items() if key not in common or common[key] != value}
            row["without"] = [key for key in common if key not in config] if config else []
            if row != entry.row:
                entry.row, entry.version = row, self._next()

    def _next(self) -> int:
        self._cursor += 1
        return self._cursor


def key_of(path: Path) -> str:
    """Return the key of a run directory."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:24]  # nobody finds another path with this key


def _public(entry: Entry) -> dict[str, Any]:
    row = entry.row or {"id": entry.run.id, "name": entry.run.name, "state": None, "created": entry.created}
    return {**row, "key": entry.key, "root": entry.root}
