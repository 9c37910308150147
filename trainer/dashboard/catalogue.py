"""The runs of all roots: found, read again when they are due, and told apart by what changed since a cursor."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.state import ACTIVE

ACTIVE_EVERY_S, ENDED_EVERY_S, SLURM_EVERY_S = 2.0, 30.0, 15.0
"""Seconds between two looks at an active run, at another run and at the folders, and between two questions to SLURM."""
_WATCHED = ("", "config.yaml", "launch.json", "events.jsonl", "metrics.jsonl", "attempts", "checkpoints", "control")
"""What changes when a run is launched again, or when something is deleted from it."""
_BATCH = 200

RowOf = Callable[[RunDirectory, Mapping[str, str] | None], dict[str, Any]]


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
    checked: float = -math.inf
    signature: tuple[Any, ...] = ()

    @property
    def is_active(self) -> bool:
        """Whether it may change without a new launch."""
        return self.row is None or self.row["state"] in ACTIVE


class Catalogue:
    """All runs. `refresh` reads files and blocks: it belongs into a thread. All else answers from memory.

    Args:
        roots: Folders of runs, or run directories.
        row_of: Reads the row of a run.
    """

    def __init__(self, roots: Sequence[Path], row_of: RowOf) -> None:
        self.roots = [Path(root).absolute() for root in roots]
        self._row_of = row_of
        self._entries: dict[str, Entry] = {}
        self._removed: dict[str, int] = {}
        """Key to the cursor at which the run was found to be deleted."""
        self._lock = threading.Lock()
        self._cursor = 0
        self._listed = self._asked = -math.inf
        self._slurm: dict[str, str] = {}
        self._common: dict[str, Any] | None = None
        """The configuration of the first run that was read; rows have what differs from it."""
        self._common_at = 0
        self.reads = 0
        """Number of rows read so far."""

    def refresh(self, now: float | None = None) -> None:
        """Read what is due, newest runs first."""
        now = time.monotonic() if now is None else now
        if now - self._listed >= ENDED_EVERY_S:
            self._listed = now
            self._list()
        due = [entry for entry in self._by_age() if self._is_due(entry, now)]
        for start in range(0, len(due), _BATCH):
            batch = due[start : start + _BATCH]
            self._ask_slurm(batch, now)
            for entry in batch:
                self._read(entry, now)

    def look(self, key: str) -> None:
        """Read one run again now, such as after a request to stop it."""
        if entry := self._entries.get(key):
            self._asked = -math.inf
            self._ask_slurm([entry], time.monotonic())
            self._read(entry, time.monotonic())

    def entry(self, key: str) -> Entry | None:
        """Return the run of a key; None for any other text."""
        return self._entries.get(key)

    def entries(self) -> list[Entry]:
        """Return all runs, newest first."""
        return self._by_age()

    def changes(self, since: int) -> dict[str, Any]:
        """Return the rows that changed after a cursor, and the next cursor. Since 0: all of them."""
        with self._lock:
            since = since if 0 <= since <= self._cursor else 0
            entries = self._by_age()
            return {
                "cursor": self._cursor,
                "reset": since == 0,
                "unread": sum(entry.row is None for entry in entries),
                "common": self._common if since < self._common_at or since == 0 else None,
                "rows": [_public(entry) for entry in entries if entry.version > since],
                "removed": [key for key, at in self._removed.items() if at > since] if since else [],
            }

    def _by_age(self) -> list[Entry]:
        return sorted(self._entries.values(), key=lambda entry: (-entry.created, entry.key))

    def _list(self) -> None:
        """Find runs that are new or gone."""
        found = {key_of(run.path): (run, root) for root, folder in enumerate(self.roots) for run in _runs_in(folder)}
        with self._lock:
            for key, (run, root) in found.items():
                if key not in self._entries:
                    self._entries[key] = Entry(key, run, root, run.created_at(), version=self._next())
                    self._removed.pop(key, None)
            for key in self._entries.keys() - found.keys():
                del self._entries[key]
                self._removed[key] = self._next()

    def _next(self) -> int:
        self._cursor += 1
        return self._cursor

    @staticmethod
    def _is_due(entry: Entry, now: float) -> bool:
        if entry.row is None:
            return True
        if entry.is_active:
            return now - entry.checked >= ACTIVE_EVERY_S
        if now - entry.checked < ENDED_EVERY_S:
            return False
        entry.checked = now
        return _signature(entry.run) != entry.signature

    def _ask_slurm(self, entries: list[Entry], now: float) -> None:
        """Query SLURM for jobs of runs that are read for the first time, and of the active ones now and then."""
        asked = [entry.run for entry in entries if entry.row is None]
        if now - self._asked >= SLURM_EVERY_S:
            self._asked = now
            active = (entry for entry in self._entries.values() if entry.row and entry.is_active)
            asked += [entry.run for entry in active if entry.row and entry.row.get("slurm_job_id")]
        if asked and (states := states_of(asked)):
            self._slurm.update(states)

    def _read(self, entry: Entry, now: float) -> None:
        signature = _signature(entry.run)  # before the files: a change in between is seen next time
        row = self._row_of(entry.run, self._slurm or None)
        self.reads += 1
        with self._lock:
            config = row.pop("config", {})
            if self._common is None and config:
                self._common, self._common_at = config, self._next()
            common = self._common or {}
            row["config"] = {key: value for key, value in config.items() if key not in common or common[key] != value}
            row["without"] = [key for key in common if key not in config] if config else []
            entry.checked, entry.signature = now, signature
            if row != entry.row:
                entry.row, entry.version = row, self._next()


def key_of(path: Path) -> str:
    """Return the key of a run directory."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def _public(entry: Entry) -> dict[str, Any]:
    row = entry.row or {"id": entry.run.id, "name": entry.run.name, "state": None, "created": entry.created}
    return {**row, "key": entry.key, "root": entry.root}


def _runs_in(folder: Path) -> Iterator[RunDirectory]:
    """Yield the runs in a folder, or the run that it is. A folder that cannot be read now has none."""
    if RunDirectory(folder).exists():
        yield RunDirectory(folder)
        return
    try:
        paths = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return
    yield from (run for run in map(RunDirectory, map(Path, paths)) if run.exists())


def _signature(run: RunDirectory) -> tuple[Any, ...]:
    """Return sizes and times of change of what a new launch changes."""
    found: list[tuple[int, int] | None] = []
    for name in _WATCHED:
        try:
            status = os.stat(run.path / name)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)
