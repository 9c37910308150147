"""Rows of all runs in a folder, kept up to date: a run that ended costs three calls of the file system.

An `Index` is for one folder of runs. `refresh` looks at the folder again, `since` returns what has changed. Active runs
are read from their directories each time; of a run that ended, the row comes from memory, from the cache of this user
(`row_cache.py`), from its sealed summary (`seal.py`), or is derived and sealed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core import records
from trainer.core.errors import EnvironmentFault, TrainerError
from trainer.core.files import subfolders
from trainer.runs import seal
from trainer.runs.directory import RunDirectory
from trainer.runs.ending import is_over, waits_ns_of
from trainer.runs.facts import Facts, flat_config
from trainer.runs.metric_ranges import Ranges, RangeScan
from trainer.runs.row import Row
from trainer.runs.row_cache import RowCache
from trainer.runs.seal import Sealed, Signature, signature
from trainer.runs.state import RUNNING_JOB, WAITING_JOB, state_of
from trainer.runs.summary import summary_in_state

SEALING_S = 2.0
"""CPU seconds of one `refresh` in which runs are sealed; the others wait for the next one."""
QueryJobs = Callable[[list[str]], Mapping[str, str] | None]
"""Returns the states of SLURM jobs, as `runs.state.state_of` takes them; None if SLURM does not respond."""


@dataclass(frozen=True)
class Changes:
    """What has changed since a cursor."""

    cursor: int
    """For the next call of `since`."""
    is_complete: bool
    """Whether these are all rows: what the caller had is to be replaced, because its cursor is of another index."""
    rows: list[Row]
    gone: list[Path]
    """Runs that do not exist any more."""
    problems: dict[Path, str]
    """All runs that cannot be read, each with the reason."""


@dataclass
class _Known:
    """What the index remembers about a run."""

    row: Row | None = None
    seen: dict[str, Signature] = field(default_factory=dict)
    """The signatures under which the row of a run that ended is true; empty: it is derived each time."""
    is_over: bool = False
    config: tuple[Signature, Facts, Facts] | None = None
    """The signature of `config.yaml`, and the configuration: nested and flat."""
    scan: RangeScan | None = None


class Index:
    """The runs of one folder. Its methods may be called from several threads.

    Args:
        root: The folder of runs.
        query_jobs: Asks SLURM for the states of jobs, once per refresh. None: the heartbeats decide.
        use_cache: Read and write the cache of this user.
        seal_runs: Seal runs that ended, if this user owns them.
    """

    def __init__(
        self, root: Path, query_jobs: QueryJobs | None = None, *, use_cache: bool = True, seal_runs: bool = True
    ) -> None:
        self.root = Path(root).absolute()
        self._prefix = f"{self.root}{os.sep}"
        self._query_jobs = query_jobs
        self._seal_runs = seal_runs
        self._cache = RowCache(self.root) if use_cache else None
        self._cached: dict[str, Sealed] = {}
        self._known: dict[str, _Known] = {}
        self._unsaved: set[str] = set()
        """Names of the rows that the cache does not have yet."""
        self._gone: dict[str, int] = {}
        self._problems: dict[str, str] = {}
        self._cursor = self._first = time.time_ns()
        """Later than all cursors of an earlier process."""
        self._lock = threading.Lock()
        self._is_loaded = False

    def refresh(self, only_active: bool = False) -> None:
        """Look at the folder again.

        Args:
            only_active: Look at active runs, new ones, and whether others still exist.

        Raises:
            EnvironmentFault: The folder cannot be read.
        """
        with self._lock:
            if not self._is_loaded:
                self._cached = self._cache.load() if self._cache else {}
                self._is_loaded = True
            names = _folders(self.root)
            for name in self._known.keys() - set(names):
                self._drop(name)
            rest = [name for name in names if not (only_active and self._is_settled(name))]
            rest = [name for name in rest if not self._is_unchanged(name) and not self._read_sealed(name)]
            asked = [] if only_active else [name for name in names if self._asks_slurm(name)]
            jobs = self._states(rest, asked)
            self._derive_all(rest + [name for name in asked if self._is_in_queue(name, jobs)], jobs)
            self._save(set(names))

    def rows(self) -> list[Row]:
        """Return the row of every run that can be read, oldest first, as of the last refresh."""
        rows = [known.row for known in list(self._known.values()) if known.row is not None]
        return sorted(rows, key=lambda row: (row.facts["created"], row.folder))

    def problems(self) -> dict[Path, str]:
        """Return the runs that cannot be read, each with the reason."""
        return {self.root / name: problem for name, problem in list(self._problems.items())}

    def since(self, cursor: int = 0) -> Changes:
        """Return what has changed since `cursor`, which an earlier call returned; 0 for everything."""
        with self._lock:
            is_complete = not self._first <= cursor <= self._cursor
            rows = [row for row in self.rows() if is_complete or row.cursor > cursor]
            gone = [] if is_complete else [self.root / name for name, at in self._gone.items() if at > cursor]
            return Changes(self._cursor, is_complete, rows, gone, self.problems())

    def _is_settled(self, name: str) -> bool:
        known = self._known.get(name)
        return known is not None and known.row is not None and not known.row.is_active

    def _is_unchanged(self, name: str) -> bool:
        """Return whether the row in memory or in the cache is true, by three calls."""
        known = self._known.get(name)
        if known is not None and known.seen:
            return self._holds(name, known.seen)
        cached = self._cached.get(name) if known is None else None
        if cached is None or not self._holds(name, cached.seen):
            return False
        row = self._row(name, cached.facts, cached.content)
        self._known[name] = _Known(row, cached.seen, cached.is_over)
        self._mark_changed(name)
        return True

    def _holds(self, name: str, seen: Mapping[str, Signature]) -> bool:
        folder = f"{self._prefix}{name}"
        return all(signature(f"{folder}/{file}") == found for file, found in seen.items())

    def _row(self, name: str, facts: Facts, content: bytes = b"") -> Row:
        """Return a row; what the content of a sealed summary lacks is read from the run directory when it is needed."""
        run = f"{self._prefix}{name}"

        def config() -> Mapping[str, Any]:
            found = seal.parse(content)
            return self._config_of(RunDirectory(Path(run)), self._entry(name))[1] if found is None else found.config

        def ranges() -> Ranges:
            found, known = seal.parse(content), self._entry(name)
            sealed = None if found is None else seal.ranges_of(found)
            if sealed is not None:
                return sealed
            known.scan = known.scan or RangeScan(Path(run, "metrics.jsonl"))
            return known.scan.read()

        return Row(run, facts, config, ranges)

    def _entry(self, name: str) -> _Known:
        return self._known.setdefault(name, _Known())

    def _asks_slurm(self, name: str) -> bool:
        """Return whether a scheduler may run the job of this run again, although it ended."""
        known = self._known.get(name)
        return bool(known and known.row and known.seen and not known.is_over and known.row.facts["slurm_job_id"])

    def _is_in_queue(self, name: str, jobs: Mapping[str, str] | None) -> bool:
        row = self._known[name].row
        return row is not None and (jobs or {}).get(row.facts["slurm_job_id"]) in WAITING_JOB + RUNNING_JOB

    def _states(self, rest: Iterable[str], asked: Iterable[str]) -> Mapping[str, str] | None:
        """Return the states of the jobs of these runs, unless no scheduler runs them again."""
        job_ids = {_job_of(RunDirectory(self.root / name)) for name in rest}
        job_ids |= {row.facts["slurm_job_id"] for name in asked if (row := self._known[name].row)}
        found = sorted(job_id for job_id in job_ids if job_id)
        return self._query_jobs(found) if found and self._query_jobs else None

    def _derive_all(self, names: list[str], jobs: Mapping[str, str] | None) -> None:
        deadline = time.process_time() + SEALING_S
        for name in names:
            run = RunDirectory(self.root / name)
            try:
                if run.exists():
                    self._derive(run, jobs, may_seal=self._seal_runs and time.process_time() < deadline)
                    self._problems.pop(name, None)
                else:
                    self._drop(name)
            except Exception as error:  # whatever it is, the other runs are listed
                self._drop(name)
                reason = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
                self._problems[name] = reason

    def _read_sealed(self, name: str) -> bool:
        """Take the row from the sealed summary, if there is one that is true."""
        found = seal.read(f"{self._prefix}{name}")
        if found is None:
            return False
        self._set(name, self._row(name, found.facts, found.content), found.seen, found.is_over)
        self._keep(name, found)
        self._problems.pop(name, None)
        return True

    def _derive(self, run: RunDirectory, jobs: Mapping[str, str] | None, may_seal: bool) -> None:
        """Derive the facts from the run directory; seal them, or remember them, if the run has ended for good."""
        name = run.path.name
        sources, skips = seal.signatures(run), records.skips
        known = self._entry(name)
        config, flat = self._config_of(run, known)
        state = state_of(run, jobs)
        facts = summary_in_state(run, state, config)
        self._set(name, self._row(name, facts), {}, False)
        self._cached.pop(name, None)
        is_own = os.stat(run.path).st_uid == os.geteuid()
        if state.is_active and is_own:
            run.unseal()
        waits_ns = waits_ns_of(run, state, jobs)
        if waits_ns is None or records.skips != skips:  # each list reports what it had to skip
            return
        if not seal.is_settled(sources, time.time_ns(), waits_ns) or (is_own and self._seal_runs and not may_seal):
            return
        summary = seal.summary_of(run, facts, flat, sources, is_over(run))
        if is_own and may_seal and seal.write(run, summary, waits_ns):
            return
        if not seal.is_being_changed(run) and seal.signatures(run) == sources:  # of somebody else, or read-only
            seen = {seal.FILE: signature(run.summary_path), **sources}
            kept = Sealed(seen, summary.is_over, facts, seal.content_of(summary))
            self._set(name, self._row(name, facts, kept.content), seen, summary.is_over)
            self._keep(name, kept)

    def _keep(self, name: str, row: Sealed) -> None:
        """Add a row to those that are written to the cache."""
        self._cached[name] = row
        self._unsaved.add(name)

    def _config_of(self, run: RunDirectory, known: _Known) -> tuple[Facts, Facts]:
        """Return the configuration, nested and flat; it is parsed once."""
        found = signature(run.config_path)
        if known.config is None or known.config[0] != found or not found:
            config = run.config()
            known.config = found, config, flat_config(run, config, run.manifest())
        return known.config[1], known.config[2]

    def _set(self, name: str, row: Row, seen: dict[str, Signature], over: bool) -> None:
        known = self._entry(name)
        before, known.row, known.seen, known.is_over = known.row, row, seen, over
        self._gone.pop(name, None)
        if before is not None and before.facts == row.facts:
            row.cursor = before.cursor
        else:
            self._mark_changed(name)

    def _mark_changed(self, name: str) -> None:
        self._cursor += 1
        row = self._known[name].row
        assert row is not None
        row.cursor = self._cursor

    def _drop(self, name: str) -> None:
        known = self._known.pop(name, None)
        self._cached.pop(name, None)
        self._problems.pop(name, None)
        if known is not None and known.row is not None:
            self._cursor += 1
            self._gone[name] = self._cursor

    def _save(self, names: set[str]) -> None:
        """Write the cache if a row is new, or a tenth of its rows are of runs that are gone."""
        gone = self._cached.keys() - names
        if self._cache and (self._unsaved or len(gone) > len(names) // 10):
            for name in gone:
                del self._cached[name]
            self._cache.save(self._cached, self._unsaved)
            self._unsaved = set()


def rows(root: Path | str, query_jobs: QueryJobs | None = None) -> list[Row]:
    """Return the row of every run in a folder that can be read, oldest first."""
    index = Index(Path(root), query_jobs)
    index.refresh()
    return index.rows()


def _folders(root: Path) -> list[str]:
    """Return the names of the folders in `root` that may be runs."""
    try:
        return [name for name in subfolders(root) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EnvironmentFault(f"{root} cannot be read: {error.strerror}", "name another with --runs-dir") from None


def _job_of(run: RunDirectory) -> str | None:
    """Return the SLURM job of a run that is not over; None if `launch.json` is damaged, which is reported later."""
    try:
        job_id = run.launch().slurm_job_id
    except records.BadRecord:
        return None
    return None if job_id is None or is_over(run) else job_id
