"""The directory of a sweep, `sweeps/<name>-<id>/`, and its files, each of which decides one thing once.

A decision is a file that is linked into its place: of several processes that decide the same thing one succeeds, and
the others read what it has decided. No file is changed afterwards, and no process need live between two decisions.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainer.core import records
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.files import subfolders, sync, write_atomic
from trainer.core.secrets import mask
from trainer.runs.registry import as_argument, choose, runs_dir_from
from trainer.sweeps.records import Array, ArrayJob, Owner, Prune, Result, Retry, Spec, Trial, TrialRun

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_TRIAL_FILE = re.compile(r"([0-9]{5,9})\.(trial|owner|run|result|retry|prune)(?:-([0-9]{1,6}))?")
MOST_TRIALS = 100_000
T = TypeVar("T")


def sweeps_dir_of(runs_dir: Path) -> Path:
    """Return the folder of the sweeps whose runs are in `runs_dir`: `sweeps` beside it."""
    return runs_dir.expanduser().absolute().parent / "sweeps"


@dataclass
class Names:
    """The numbers in the names of a trial's files."""

    owners: int = 0
    """One more than the largest number of an owner."""
    runs: list[int] = field(default_factory=list)
    """Owners that have written their run, in order."""
    retries: int = 0
    results: set[int] = field(default_factory=set)
    """Rounds that have a result: 0, and J after the J-th retry."""
    pruned: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether the trial has a result that no retry has voided."""
        return self.retries in self.results


class SweepDirectory:
    """A sweep: its paths, and the reader and writer of each record. Creating the object reads nothing."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self.name, _, self.id = self.path.name.rpartition("-")
        self.trials_dir = self.path / "trials"
        self.arrays_dir = self.path / "arrays"
        self.logs_dir = self.path / "logs"
        self.slots_dir = self.path / "slots"
        self.stop_request = self.path / "stop"
        self.manifest_path = self.path / "manifest.json"

    @classmethod
    def new(cls, sweeps_dir: Path, name: str) -> SweepDirectory:
        """Create the directory of a sweep, with its empty folders, by an exclusive mkdir.

        Raises:
            UserError: The name cannot be the name of a folder.
            EnvironmentFault: The folder cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"name={name!r} cannot name a folder", "use letters, digits, '.', '_' and '-'")
        try:
            sweeps_dir.mkdir(parents=True, exist_ok=True)
            if not (sweeps_dir / ".gitignore").exists():  # else git would list the code that the sweeps have frozen
                write_atomic(sweeps_dir / ".gitignore", "*\n")
            while True:
                identity = "".join(secrets.choice(_ALPHABET) for _ in range(8))
                sweep = cls(sweeps_dir / f"{name}-{identity}")
                try:
                    sweep.path.mkdir(mode=0o700)
                except FileExistsError:
                    continue
                for folder in (sweep.trials_dir, sweep.arrays_dir, sweep.logs_dir, sweep.slots_dir):
                    folder.mkdir()
                sync(sweeps_dir)
                return sweep
        except OSError as error:
            raise EnvironmentFault(
                f"cannot create a sweep in {sweeps_dir}: {error.strerror}", "set runs_dir to a folder you can write"
            ) from None

    def exists(self) -> bool:
        """Return whether this is a sweep that was created completely."""
        return os.path.isfile(self.path / "spec.json")

    def spec(self) -> Spec:
        """Return the newest revision of the spec.

        Raises:
            BadRecord: It is damaged or of a newer version.
        """
        revisions = [path.stem.partition("-")[2] for path in self.path.glob("spec*.json")]
        newest = max((int(one) for one in revisions if one.isdecimal()), default=0)
        path = self._spec_path(newest)
        spec = records.read(Spec, path, revision=newest)
        if spec is None:
            raise records.damaged(path, "it is missing")
        return spec

    def write_spec(self, spec: Spec) -> bool:
        """Write a revision of the spec; return False if another process has written it."""
        return decide(self._spec_path(spec.revision), spec, indent=1)

    def _spec_path(self, revision: int) -> Path:
        return self.path / (f"spec-{revision}.json" if revision else "spec.json")

    def names(self) -> dict[int, Names]:
        """Return what files each trial has, by number, from one listing of the folder."""
        found: dict[int, Names] = {}
        decided: set[int] = set()
        for entry in os.scandir(self.trials_dir):
            match = _TRIAL_FILE.fullmatch(entry.name)
            if match is None:
                continue
            number, kind, index = int(match[1]), match[2], int(match[3] or 0)
            names = found.setdefault(number, Names())
            if kind == "trial":
                decided.add(number)
            elif kind == "owner":
                names.owners = max(names.owners, index + 1)
            elif kind == "run":
                names.runs.append(index)
            elif kind == "retry":
                names.retries = max(names.retries, index)
            else:
                (names.results if kind == "result" else names.pruned).add(index)
        for names in found.values():
            names.runs.sort()
        return {number: found[number] for number in sorted(decided)}

    def trial(self, number: int) -> Trial:
        """Return a trial that exists. Raises BadRecord if it is damaged."""
        return self._existing(Trial, self._path(number, "trial"), number=number)

    def owner(self, number: int, index: int) -> Owner:
        """Return an owner that exists. Raises BadRecord if it is damaged."""
        return self._existing(Owner, self._path(number, "owner", index), number=index)

    def run_of(self, number: int, index: int) -> TrialRun | None:
        """Return the run of an owner."""
        return records.read(TrialRun, self._path(number, "run", index))

    def result(self, number: int, round_: int) -> Result | None:
        """Return the result of a round; None if there is none yet."""
        return records.read(Result, self._path(number, "result", round_ or None))

    def retry(self, number: int, round_: int) -> Retry:
        """Return a retry that exists. Raises BadRecord if it is damaged."""
        return self._existing(Retry, self._path(number, "retry", round_))

    def prune(self, number: int, round_: int) -> Prune | None:
        """Return the decision to prune a trial."""
        return records.read(Prune, self._path(number, "prune", round_))

    def add_trials(self, trials: Iterable[Trial]) -> bool:
        """Write trials that are decided together; return False if another process has decided one of them."""
        made = [decide(self._path(one.number, "trial"), one, flush=False) for one in trials]
        sync(self.trials_dir)
        return all(made)

    def add_owner(self, number: int, owner: Owner) -> bool:
        """Claim a trial; return False if another process has claimed it."""
        return decide(self._path(number, "owner", owner.number), owner)

    def add_run(self, number: int, index: int, run: TrialRun) -> bool:
        """Record the run that an owner is about to make or to resume."""
        return decide(self._path(number, "run", index), run)

    def add_result(self, number: int, round_: int, result: Result) -> bool:
        """Record how a trial ended; return False if it is recorded already."""
        return decide(self._path(number, "result", round_ or None), result)

    def add_retry(self, number: int, round_: int, retry: Retry) -> bool:
        """Void a result; return False if another process has done so."""
        return decide(self._path(number, "retry", round_), retry)

    def add_prune(self, number: int, round_: int, prune: Prune) -> bool:
        """Decide to prune a trial; return False if that is decided already."""
        return decide(self._path(number, "prune", round_), prune)

    def arrays(self) -> dict[int, tuple[Array, ArrayJob | None]]:
        """Return the job arrays by number, each with its job if that is known."""
        numbers = sorted(int(path.stem) for path in self.arrays_dir.glob("*.array") if path.stem.isdecimal())
        return {
            number: (
                self._existing(Array, self.arrays_dir / f"{number:03d}.array"),
                records.read(ArrayJob, self.arrays_dir / f"{number:03d}.job"),
            )
            for number in numbers
        }

    def add_array(self, number: int, array: Array) -> bool:
        """Decide to submit an array; return False if another process has taken the number."""
        return decide(self.arrays_dir / f"{number:03d}.array", array)

    def add_array_job(self, number: int, job: ArrayJob) -> bool:
        """Note the job of an array."""
        return decide(self.arrays_dir / f"{number:03d}.job", job)

    def _path(self, number: int, kind: str, index: int | None = None) -> Path:
        return self.trials_dir / (f"{number:05d}.{kind}" + ("" if index is None else f"-{index}"))

    @staticmethod
    def _existing(kind: type[T], path: Path, **known: Any) -> T:
        record = records.read(kind, path, **known)
        if record is None:
            raise records.damaged(path, "it is missing")
        return record


def decide(path: Path, record: Any, *, indent: int | None = None, flush: bool = True) -> bool:
    """Write a record to `path` unless the file exists, and return whether this process has written it.

    The link decides. Its count of links is looked at rather than the reply, which NFS may lose: then the client asks
    again and is told that the file exists, although it is its own (open(2), O_EXCL).

    Args:
        path: The file.
        record: Its content.
        indent: Indentation of the JSON text.
        flush: Flush the folder too; False if the caller does so for several files.
    """
    token = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.parent / f".{path.name}.{token}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(mask(records.dumps(record, indent)))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        won = os.stat(temporary).st_nlink == 2
    except OSError as error:
        raise EnvironmentFault(
            f"{path.parent}: cannot be written: {error.strerror}", "free space; the file system needs hard links"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    if flush:
        sync(path.parent)
    return won


def all_sweeps(sweeps_dir: Path) -> list[SweepDirectory]:
    """Return every sweep in a folder, oldest first."""
    try:
        found = [SweepDirectory(sweeps_dir / name) for name in subfolders(sweeps_dir)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EnvironmentFault(f"{sweeps_dir} cannot be read: {error.strerror}", "get permission to read it") from None
    return sorted((one for one in found if one.exists()), key=lambda one: (_created(one), one.path.name))


def reference_to(sweep: SweepDirectory) -> str:
    """Return how to type a sweep on the command line: its id if `find` searches its folder by default, else its path.

    The path is quoted for a shell.
    """
    if sweeps_dir_of(runs_dir_from(None)) == sweep.path.parent:
        return sweep.id
    return as_argument(sweep.path)


def find(reference: str | None, sweeps_dir: Path) -> SweepDirectory:
    """Return the sweep that a reference names: an id, a name, a prefix, a path; None: the latest.

    Raises:
        UserError: There is no such sweep, or several have this prefix.
    """
    if reference and ("/" in reference or os.path.isdir(reference)):
        sweep = SweepDirectory(Path(reference))
        if sweep.exists():
            return sweep
        if "/" in reference:
            raise UserError(f"{reference} is not a sweep", "it has no spec.json; trainer sweep ls lists the sweeps")
    sweeps = all_sweeps(sweeps_dir)
    if not sweeps:
        raise UserError(f"there are no sweeps in {sweeps_dir}", "start one: trainer sweep optimizer.lr=0.01,0.001")
    return choose(reference, sweeps, "sweep", sweeps_dir, "trainer sweep ls lists the sweeps", also=lambda sweep: False)


def request_stop(sweep: SweepDirectory, reason: str) -> None:
    """Let no further trial of the sweep start.

    Raises:
        EnvironmentFault: The request cannot be written.
    """
    try:
        write_atomic(sweep.stop_request, reason + "\n")
    except OSError as error:
        raise EnvironmentFault(f"{sweep.path}: cannot be written: {error.strerror}", "free space") from None


def _created(sweep: SweepDirectory) -> float:
    try:
        return (sweep.path / "spec.json").stat().st_mtime
    except OSError:
        return 0.0
