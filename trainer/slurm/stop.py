"""Stop or cancel the job of a run. The caller has written `control/stop`, which prevents requeueing."""

from __future__ import annotations

import time

from trainer.core.errors import DONE, UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended
from trainer.runs.records import AttemptOutcome
from trainer.slurm import query
from trainer.slurm.commands import SlurmRefused
from trainer.slurm.commands import run as call

_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")


def stop(run: RunDirectory) -> None:
    """Ask the ranks of a running job to save a checkpoint and exit; cancel a pending job.

    Raises:
        EnvironmentFault: SLURM does not respond.
    """
    job_id = job_of(run)
    state = query.states([job_id]).get(job_id)
    if state in _WAITS:
        cancel(run)
        reason = "stopped while it waited"
        outcome = AttemptOutcome(
            attempt=run.next_attempt(), outcome="stopped", exit_code=DONE, reason=reason, time=time.time()
        )
        run.write_outcome(outcome)
        run.add_event(Ended(event="stopped", reason=reason))
    elif state == "RUNNING":
        try:
            call("scancel", "--signal=USR1", job_id)
        except SlurmRefused:  # it has just ended
            pass


def job_of(run: RunDirectory) -> str:
    """Return the id of the run's job, checked: with another one in `launch.json`, another job would be cancelled.

    Raises:
        UserError: SLURM knows the job under another name than that of the run.
        EnvironmentFault: SLURM does not respond.
    """
    job_id = str(run.launch().slurm_job_id)
    name = query.job(job_id).get("JobName") if job_id.isdigit() else job_id
    if name is not None and name != run.path.name:
        raise UserError(
            f"launch.json of {run.path.name} names job {ascii(job_id)[1:-1]}, which is not a job of this run",
            "squeue --me lists your jobs; cancel the one you mean with scancel",
        )
    return job_id


def cancel(run: RunDirectory) -> None:
    """Cancel the job; a running one gets SIGTERM, then SIGKILL."""
    try:
        call("scancel", job_of(run))
    except SlurmRefused:  # it is gone
        pass
