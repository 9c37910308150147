"""Determine the state of a run from its directory and from whether its process exists, so that crashes are detected."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from trainer.core import processes
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Started
from trainer.runs.records import Launch, Outcome

StateName = Literal["queued", "starting", "running", "stopping", "requeued", "dead", "failed", "stopped", "finished"]
STATES: tuple[StateName, ...] = get_args(StateName)
ACTIVE = ("queued", "starting", "running", "stopping", "requeued")
SILENT_AFTER_S = 60.0
"""A heartbeat is written every second. On another host, a run whose heartbeats are older is dead."""
WAITING_JOB = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING_JOB = ("RUNNING", "CONFIGURING", "RESIZING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
"""SLURM's long names of the states of a job that waits, or has processes."""
_ENDS: dict[Outcome, StateName] = {
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "hung": "failed",
    "requeue": "stopped",
}


@dataclass(frozen=True)
class State:
    """The state of a run."""

    name: StateName
    reason: str = ""
    """A sentence, or empty."""

    @property
    def is_active(self) -> bool:
        """Whether the run is in the queue or has processes."""
        return self.name in ACTIVE


def state_of(run: RunDirectory, slurm_states: Mapping[str, str] | None = None) -> State:
    """Return the state of a run.

    Args:
        run: The run.
        slurm_states: SLURM job id to the state name of squeue or sacct. A job that is missing from it is no longer
            known to SLURM. None: SLURM was not queried, and the heartbeats decide.
    """
    launch = run.launch()
    if launch.slurm_job_id and slurm_states is not None:
        return _slurm_state(run, launch, slurm_states.get(launch.slurm_job_id))
    return _living_state(run, launch) if is_alive(run, launch) else ended_state(run, launch)


def is_alive(run: RunDirectory, launch: Launch) -> bool:
    """Return whether the process in `launch.json` runs; on another host, whether a heartbeat is recent."""
    if launch.host == socket.gethostname() and launch.boot_id == processes.boot_id():
        return launch.pid is not None and processes.is_alive(launch.pid, launch.pid_started)
    beats = run.heartbeats().values()
    return any(time.time() - beat.time < SILENT_AFTER_S and beat.phase not in _ENDS for beat in beats)


def _living_state(run: RunDirectory, launch: Launch) -> State:
    if run.stop_request.exists():
        return State("stopping", "stop requested; a checkpoint is saved first")
    return State("running") if _has_started(run, launch) else State("starting")


def _has_started(run: RunDirectory, launch: Launch) -> bool:
    """Return whether a rank of this launch, not of an earlier one, has started."""
    return any(event.attempt >= launch.attempt for event in run.events_of(Started))


def ended_state(run: RunDirectory, launch: Launch) -> State:
    """Return the state of a run whose processes are gone, or are about to be: its last outcome, else `dead`."""
    if not launch.was_made:
        return State("dead", "it was never launched")
    final = [end for end in run.attempts() if end.attempt >= launch.attempt and not end.restarted]
    if final:
        return State(_ENDS[final[-1].outcome], final[-1].reason)
    return State("dead", "its processes are gone and recorded no outcome: they were killed, or the machine went down")


def _slurm_state(run: RunDirectory, launch: Launch, job: str | None) -> State:
    """Return the state for squeue's long state name: PENDING, RUNNING, COMPLETING, ..."""
    if job in WAITING_JOB:
        return State("requeued" if run.attempts() else "queued", job.lower())
    if job in RUNNING_JOB:
        return _living_state(run, launch)
    if job == "COMPLETING":
        ended = ended_state(run, launch)
        last = run.attempts()[-1:]
        # After a save for a requeue SLURM shows the job as pending only once the processes of the attempt are gone.
        if ended.name == "dead" or (last and last[0].outcome == "requeue"):
            return State("stopping", "SLURM is ending this attempt")
        return ended
    return ended_state(run, launch)
