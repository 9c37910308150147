"""What the schedulers say of runs: asked once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trainer.core.errors import EnvironmentFault
from trainer.runs.directory import RunDirectory


def states_of(runs: Iterable[RunDirectory]) -> Mapping[str, str] | None:
    """SLURM job id to state name for the runs that SLURM has; None where no run is SLURM's or SLURM does not answer."""
    job_ids = [str(job_id) for run in runs if (job_id := run.launch().get("slurm_job_id")) and not is_over(run)]
    if not job_ids:
        return None
    from trainer.slurm import query

    try:
        return query.states(job_ids)
    except EnvironmentFault:
        return None


def why_it_waits(run: RunDirectory) -> list[str]:
    """Sentences on why the job of a run waits; empty where no scheduler has it. Raises EnvironmentFault where SLURM
    does not answer."""
    job_id = run.launch().get("slurm_job_id")
    if not job_id:
        return []
    from trainer.slurm import pending

    return pending.explain(str(job_id))


def is_over(run: RunDirectory) -> bool:
    """Whether the newest attempt of the last launch recorded an end after which nothing is run again."""
    ends = [record for record in run.attempts() if record["attempt"] >= run.launch().get("attempt", 0)]
    return bool(ends) and ends[-1].get("outcome") in ("finished", "stopped") and not ends[-1].get("restarted")
