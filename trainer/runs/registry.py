"""Find runs. There is no database: the runs directory is the registry."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

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
    if reference and ("/" in reference or Path(reference).is_dir()):
        run = RunDirectory(Path(reference))
        if run.exists():
            return run
        if not Path(reference).exists():
            raise UserError(f"{reference} does not exist", "trainer ls lists the runs")
        raise UserError(f"{reference} is not a run directory", "it has no config.yaml; trainer ls lists the runs")
    runs = all_runs(runs_dir)
    if not runs:
        raise UserError(
            f"there are no runs in {runs_dir}", "start one with trainer fit, or set another folder with --runs-dir"
        )
    if not reference:
        return runs[-1]
    exact = [run for run in runs if reference in (run.id, run.path.name)] or [
        run for run in runs if run.name == reference
    ]
    if exact:
        return exact[-1]
    by_job = [run for run in runs if _job_of(run) == reference]
    if by_job:
        return by_job[-1]
    matching = [run for run in runs if run.id.startswith(reference) or run.path.name.startswith(reference)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(run.path.name for run in matching[-5:])
        raise UserError(f"{reference} matches {len(matching)} runs", f"use a longer prefix: {names}")
    known = {name for run in runs for name in (run.id, run.path.name, run.name)}
    hint = did_you_mean(reference, known)
    raise UserError(f"there is no run {reference} in {runs_dir}", f"{hint}trainer ls lists the runs")


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
    path = shortest(run.path)
    return shlex.quote(path if "/" in path else f"./{path}")


def shortest(path: Path) -> str:
    """Return `path` relative to the working directory if it is below that, else unchanged."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
