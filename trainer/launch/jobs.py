"""Query the schedulers for the jobs of runs, once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trainer.core.errors import EnvironmentFault
from trainer.runs.directory import RunDirectory


def states_of(runs: Iterable[RunDirectory]) -> Mapping[str, str] | None:
    """Return SLURM job id to state of the runs on SLURM; None without any, or when SLURM does not respond."""
    job_ids = [str(job_id) for run in runs if (job_id := run.launch().get("slurm_job_id")) and not is_over(run)]
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
    job_id = run.launch().get("slurm_job_id")
    if not job_id:
        return []
    from trainer.slurm import pending

    return pending.explain(str(job_id))


def is_over(run: RunDirectory) -> bool:
    """Return whether the newest attempt of the last launch recorded an end after which the job does not run again."""
    ends = [record for record in run.attempts() if record["attempt"] >= run.launch().get("attempt", 0)]
    return bool(ends) and ends[-1].get("outcome") in ("finished", "stopped") and not ends[-1].get("restarted")
