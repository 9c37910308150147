"""Query the schedulers for the jobs of runs, once for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from trainer.core.errors import EnvironmentFault
from trainer.core.records import BadRecord
from trainer.runs.directory import RunDirectory

_JOB_ID = re.compile(r"[0-9]+([_+][0-9]+)?")


def states_of(runs: Iterable[RunDirectory]) -> Mapping[str, str] | None:
    """Return SLURM job id to state of the runs on SLURM; None without any, or when SLURM does not respond."""
    job_ids = [job_id for run in runs if (job_id := _job_of(run)) and not is_over(run)]
    if not job_ids:
        return None
    from trainer.slurm import query

    try:
        return query.states(job_ids)
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


def is_over(run: RunDirectory) -> bool:
    """Return whether the newest attempt of the last launch recorded an end after which the job does not run again."""
    ends = [end for end in run.attempts() if end.attempt >= run.launch().attempt]
    return bool(ends) and ends[-1].outcome in ("finished", "stopped") and not ends[-1].restarted


def _job_of(run: RunDirectory) -> str | None:
    """Return the SLURM job; None without one, or if `launch.json` is damaged, which is reported with the run.

    A text that is no job id (`123`, `123_4`, `123+1`) is none either: it would be an argument of SLURM's commands.
    """
    try:
        job_id = run.launch().slurm_job_id
    except BadRecord:
        return None
    return job_id if job_id and _JOB_ID.fullmatch(job_id) else None
