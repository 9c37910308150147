"""Finding runs: there is no database, the runs directory is the registry."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from trainer.core.errors import UserError
from trainer.core.near import did_you_mean
from trainer.core.records import BadRecord
from trainer.runs.directory import RunDirectory

VARIABLE = "TRAINER_RUNS_DIR"


def runs_dir_from(option: str | None) -> Path:
    """`--runs-dir`, else TRAINER_RUNS_DIR, else ./runs."""
    return Path(option or os.environ.get(VARIABLE) or "runs").expanduser()


def all_runs(runs_dir: Path) -> list[RunDirectory]:
    """Every run in `runs_dir`, oldest first; other folders are left out."""
    if not runs_dir.is_dir():
        return []
    found = [RunDirectory(path) for path in runs_dir.iterdir() if path.is_dir()]
    return sorted((run for run in found if run.exists()), key=lambda run: (run.created_at(), run.path.name))


def find(reference: str | None, runs_dir: Path) -> RunDirectory:
    """The run that `reference` means: an id or a prefix of it, a directory's name or a prefix of it, a name (its
    latest run), a path, a SLURM job id, or None for the latest of all.

    Raises UserError where there is none, or where a prefix fits several.
    """
    if reference and ("/" in reference or Path(reference).is_dir()):
        run = RunDirectory(Path(reference))
        if run.exists():
            return run
        raise UserError(f"{reference} is not a run directory", "it should hold a config.yaml; trainer ls lists runs")
    runs = all_runs(runs_dir)
    if not runs:
        raise UserError(
            f"there are no runs in {runs_dir}", "start one with trainer fit, or name another with --runs-dir"
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
    fitting = [run for run in runs if run.id.startswith(reference) or run.path.name.startswith(reference)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(run.path.name for run in fitting[-5:])
        raise UserError(f"{reference} fits {len(fitting)} runs", f"say more letters: {names}")
    known = {name for run in runs for name in (run.id, run.path.name, run.name)}
    hint = did_you_mean(reference, known)
    raise UserError(f"there is no run {reference} in {runs_dir}", f"{hint}trainer ls lists them")


def _job_of(run: RunDirectory) -> str | None:
    """The SLURM job; None where `launch.json` is damaged: another run may be meant."""
    try:
        return run.launch().slurm_job_id
    except BadRecord:
        return None


def reference_to(run: RunDirectory) -> str:
    """What `find` knows `run` by when it is typed here: its id in the runs directory that is looked through without
    `--runs-dir`, else its path, quoted for a shell."""
    if runs_dir_from(None).absolute() == run.path.parent:
        return run.id
    path = shortest(run.path)
    return shlex.quote(path if "/" in path else f"./{path}")


def shortest(path: Path) -> str:
    """`path` from the working directory where it is below that, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
