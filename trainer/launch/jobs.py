"""Query the schedulers for the jobs of runs, once for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from trainer.core.errors import EnvironmentFault
from trainer.core.records import BadRecord
from trainer.runs.directory import RunDirectory
from trainer.runs.ending import is_over

_JOB_ID = re.compile(r"[0-9]+([_+][0-9]+)?")


def states_of(runs: Iterable[RunDirectory]) -> Mapping[str, str] | None:
    """Return SLURM job id to state of the runs on SLURM; None without any, or when SLURM does not respond."""
    return states_of_jobs([job_id for run in runs if (job_id := _job_of(run)) and not is_over(run)])


def states_of_jobs(job_ids: Iterable[str]) -> Mapping[str, str] | None:
    """Return the states of SLURM jobs; None without any, or when SLURM does not respond.

    A text that is no job id (`123`, `123_4`, `123+1`) is left out: it would be an argument of SLURM's commands.
    """
    asked = [job_id for job_id in job_ids if _JOB_ID.fullmatch(job_id)]
    if not asked:
        return None
    from trainer.slurm import query

    try:
        return query.states(asked)
    except EnvironmentFault:
        return None


def why_it_waits(run: RunDirectory) -> list[str]:
    """Return sentences on why the job of a run is pending; empty when no scheduler has it.

    Raises:
        EnvironmentFault: SLURM does not respond.
    """
    job_id = _job_of(run)
    if not job_id:
        return []
    from trainer.slurm import pending

    return pending.explain(job_id)


def _job_of(run: RunDirectory) -> str | None:
    """Return the SLURM job; None without one, or if `launch.json` is damaged, which is reported with the run.

    A text that is no job id (`123`, `123_4`, `123+1`) is none either: it would be an argument of SLURM's commands.
    """
    try:
        job_id = run.launch().slurm_job_id
    except BadRecord:
        return None
    return job_id if job_id and _JOB_ID.fullmatch(job_id) else None
