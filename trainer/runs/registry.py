"""Find runs. There is no database: the runs directory is the registry."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.files import subfolders
from trainer.core.near import did_you_mean
from trainer.core.records import BadRecord
from trainer.runs.directory import RunDirectory

VARIABLE = "TRAINER_RUNS_DIR"


def runs_dir_from(option: str | None) -> Path:
    """Return `--runs-dir`, else TRAINER_RUNS_DIR, else ./runs."""
    return Path(option or os.environ.get(VARIABLE) or "runs").expanduser()


def all_runs(runs_dir: Path) -> list[RunDirectory]:
    """Return every run in `runs_dir`, oldest first. Other folders are ignored."""
    try:
        runs = [RunDirectory(runs_dir / name) for name in subfolders(runs_dir)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EnvironmentFault(f"{runs_dir} cannot be read: {error.strerror}", "name another with --runs-dir") from None
    return sorted((run for run in runs if run.exists()), key=lambda run: (run.created_at(), run.path.name))


def find(reference: str | None, runs_dir: Path) -> RunDirectory:
    """Return the run that a reference on the command line names.

    Args:
        reference: An id or directory name, or a prefix of one; a name, for its latest run; a path; a SLURM job id; None
            for the latest run of all.
        runs_dir: The folder of the runs.

    Raises:
        UserError: There is no such run, or several have this prefix.
    """
    if reference and ("/" in reference or os.path.isdir(reference)):
        run = RunDirectory(Path(reference))
        if run.exists():
            return run
        if not os.path.exists(reference):
            raise UserError(f"{reference} does not exist", "trainer ls lists the runs")
        if "/" in reference:
            raise UserError(f"{reference} is not a run directory", "it has no config.yaml; trainer ls lists the runs")
    runs = all_runs(runs_dir)
    if not runs:
        raise UserError(
            f"there are no runs in {runs_dir}", "start one with trainer fit, or set another folder with --runs-dir"
        )
    lists = "trainer ls lists the runs"
    return choose(reference, runs, "run", runs_dir, lists, also=lambda run: _job_of(run) == reference)


class Named(Protocol):
    """What a reference can name: a run or a sweep."""

    id: str
    name: str
    path: Path


N = TypeVar("N", bound=Named)


def choose(
    reference: str | None, known: Sequence[N], noun: str, folder: Path, lists: str, *, also: Callable[[N], bool]
) -> N:
    """Return what a reference names: by id or directory name, else by name, by `also`, or by a prefix.

    Args:
        reference: What was typed; None: the latest.
        known: All runs or all sweeps, oldest first, at least one.
        noun: `run` or `sweep`.
        folder: Where they are.
        lists: Which command lists them.
        also: Whether the reference names one in another way.

    Raises:
        UserError: The reference names none, or is the prefix of several.
    """
    if reference is None:
        return known[-1]
    if not reference:  # trainer rm "$RUN" without a value must not delete the latest
        raise UserError(f"an empty text names no {noun}", f"leave it out for the latest {noun}; {lists}")
    ways: tuple[Callable[[N], bool], ...] = (
        lambda one: reference in (one.id, one.path.name),
        lambda one: one.name == reference,
        also,
    )
    for way in ways:
        if named := [one for one in known if way(one)]:
            return named[-1]
    matching = [one for one in known if one.id.startswith(reference) or one.path.name.startswith(reference)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        latest = ", ".join(one.path.name for one in matching[-5:])
        raise UserError(f"{reference} matches {len(matching)} {noun}s", f"use a longer prefix: {latest}")
    names = {name for one in known for name in (one.id, one.path.name, one.name)}
    raise UserError(f"there is no {noun} {reference} in {folder}", f"{did_you_mean(reference, names)}{lists}")


def _job_of(run: RunDirectory) -> str | None:
    """Return the SLURM job; None if `launch.json` is damaged, because the reference may name another run."""
    try:
        return run.launch().slurm_job_id
    except BadRecord:
        return None


def reference_to(run: RunDirectory) -> str:
    """Return how to type a run on the command line: its id if `find` searches its folder by default, else its path.

    The path is quoted for a shell.
    """
    if runs_dir_from(None).absolute() == run.path.parent:
        return run.id
    return as_argument(run.path)


def as_argument(path: Path) -> str:
    """Return how to type a path on the command line so that it is not taken for a name, quoted for a shell."""
    shown = shortest(path)
    return shlex.quote(shown if "/" in shown else f"./{shown}")


def shortest(path: Path) -> str:
    """Return `path` relative to the working directory if it is below that, else unchanged."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
