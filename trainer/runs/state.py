"""What a run is doing, from its directory and from whether its process lives: true after any crash."""

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
"""On another machine's word: a heartbeat, written every second, that is older means that nobody lives there."""
_ENDS: dict[Outcome, StateName] = {
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "hung": "failed",
    "requeue": "stopped",
}


@dataclass(frozen=True)
class State:
    """One of STATES, and a sentence on why where there is one."""

    name: StateName
    reason: str = ""

    @property
    def is_active(self) -> bool:
        return self.name in ACTIVE


def state_of(run: RunDirectory, slurm_states: Mapping[str, str] | None = None) -> State:
    """The state of `run`.

    `slurm_states` maps SLURM job ids to squeue's or sacct's state names; a job that is not in it has left SLURM.
    None: SLURM was not asked, and a run on it is judged by its heartbeat.
    """
    launch = run.launch()
    if launch.slurm_job_id and slurm_states is not None:
        return _slurm_state(run, launch, slurm_states.get(launch.slurm_job_id))
    return _living_state(run, launch) if is_alive(run, launch) else _ended_state(run, launch)


def is_alive(run: RunDirectory, launch: Launch) -> bool:
    """Whether the process that `launch.json` names runs; on another host, whether a rank's heartbeat is fresh."""
    if launch.host == socket.gethostname() and launch.boot_id == processes.boot_id():
        return launch.pid is not None and processes.is_alive(launch.pid, launch.pid_started)
    beats = run.heartbeats().values()
    return any(time.time() - beat.time < SILENT_AFTER_S and beat.phase not in _ENDS for beat in beats)


def _living_state(run: RunDirectory, launch: Launch) -> State:
    if run.stop_request.exists():
        return State("stopping", "asked to save and leave")
    return State("running") if _has_started(run, launch) else State("starting")


def _has_started(run: RunDirectory, launch: Launch) -> bool:
    """Whether a rank of this launch, not of an earlier one, has begun."""
    return any(event.attempt >= launch.attempt for event in run.events_of(Started))


def _ended_state(run: RunDirectory, launch: Launch) -> State:
    if not launch.was_made:
        return State("dead", "it was never launched")
    final = [end for end in run.attempts() if end.attempt >= launch.attempt and not end.restarted]
    if final:
        return State(_ENDS[final[-1].outcome], final[-1].reason)
    return State("dead", "its processes are gone and left no word: killed, or the machine went down")


def _slurm_state(run: RunDirectory, launch: Launch, job: str | None) -> State:
    """squeue's long state names: PENDING, RUNNING, COMPLETING, ..."""
    if job in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"):
        return State("requeued" if run.attempts() else "queued", job.lower())
    if job in ("RUNNING", "CONFIGURING", "RESIZING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"):
        return _living_state(run, launch)
    if job == "COMPLETING":
        ended = _ended_state(run, launch)
        last = run.attempts()[-1:]
        # Saved for a requeue: SLURM shows the job as pending only once this attempt's processes are gone.
        if ended.name == "dead" or (last and last[0].outcome == "requeue"):
            return State("stopping", "SLURM is ending this attempt")
        return ended
    return _ended_state(run, launch)
