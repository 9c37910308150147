"""What a run is doing, from its directory and from whether its process lives: true after any crash."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.core import processes
from trainer.core.files import read_live
from trainer.runs.directory import RunDirectory

STATES = ("queued", "starting", "running", "stopping", "requeued", "dead", "failed", "stopped", "finished")
ACTIVE = ("queued", "starting", "running", "stopping", "requeued")
SILENT_AFTER_S = 60.0
"""On another machine's word: a heartbeat, written every second, that is older means that nobody lives there."""
_ENDS = {"finished": "finished", "stopped": "stopped", "failed": "failed", "hung": "failed", "requeue": "stopped"}


@dataclass(frozen=True)
class State:
    """One of STATES, and a sentence on why where there is one."""

    name: str
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
    job_id = launch.get("slurm_job_id")
    if job_id and slurm_states is not None:
        return _slurm_state(run, launch, slurm_states.get(str(job_id)))
    return _living_state(run, launch) if is_alive(run, launch) else _ended_state(run, launch)


def is_alive(run: RunDirectory, launch: dict[str, Any]) -> bool:
    """Whether the process that `launch.json` names runs; on another host, whether a rank's heartbeat is fresh."""
    if launch.get("host") == socket.gethostname() and launch.get("boot_id") == processes.boot_id():
        pid = launch.get("pid")
        return pid is not None and processes.is_alive(pid, launch.get("pid_started"))
    beats = [read_live(path) for path in run.live_dir.glob("rank-*.json")]
    return any(time.time() - beat.get("time", 0) < SILENT_AFTER_S and beat.get("phase") not in _ENDS for beat in beats)


def _living_state(run: RunDirectory, launch: dict[str, Any]) -> State:
    if run.stop_request.exists():
        return State("stopping", "asked to save and leave")
    return State("running") if _has_started(run, launch) else State("starting")


def _has_started(run: RunDirectory, launch: dict[str, Any]) -> bool:
    """Whether a rank of this launch, not of an earlier one, has begun."""
    first = launch.get("attempt", 0)
    return any(event["event"] == "started" and event.get("attempt", 0) >= first for event in run.events())


def _ended_state(run: RunDirectory, launch: dict[str, Any]) -> State:
    if not launch:
        return State("dead", "it was never launched")
    ends = [record for record in run.attempts() if record["attempt"] >= launch.get("attempt", 0)]
    final = [record for record in ends if not record.get("restarted")]
    if final:
        return State(_ENDS.get(final[-1]["outcome"], "failed"), final[-1].get("reason") or "")
    return State("dead", "its processes are gone and left no word: killed, or the machine went down")


def _slurm_state(run: RunDirectory, launch: dict[str, Any], job: str | None) -> State:
    """squeue's long state names: PENDING, RUNNING, COMPLETING, ..."""
    if job in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"):
        return State("requeued" if run.attempts() else "queued", job.lower())
    if job in ("RUNNING", "CONFIGURING", "RESIZING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"):
        return _living_state(run, launch)
    if job == "COMPLETING":
        ended = _ended_state(run, launch)
        last = (run.attempts() or [{}])[-1]
        # Saved for a requeue: SLURM shows the job as pending only once this attempt's processes are gone.
        if ended.name == "dead" or last.get("outcome") == "requeue":
            return State("stopping", "SLURM is ending this attempt")
        return ended
    return _ended_state(run, launch)
