"""A user's stop of a run on SLURM; `control/stop`, which says that it is never requeued, is there already."""

from __future__ import annotations

import time

from trainer.core.errors import DONE
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended
from trainer.runs.records import AttemptOutcome
from trainer.slurm import query
from trainer.slurm.commands import SlurmRefused
from trainer.slurm.commands import run as call

_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")


def stop(run: RunDirectory) -> None:
    """Ask the ranks of a running job to save and leave; cancel a job that waits. Raises EnvironmentFault when SLURM
    does not answer."""
    job_id = str(run.launch().slurm_job_id)
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


def cancel(run: RunDirectory) -> None:
    """Take the job from SLURM at once; a running one gets SIGTERM, then SIGKILL."""
    try:
        call("scancel", str(run.launch().slurm_job_id))
    except SlurmRefused:  # it is gone
        pass
