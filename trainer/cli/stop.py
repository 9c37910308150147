"""`trainer stop [RUN]`: save a checkpoint and end."""

from __future__ import annotations

import json
import time

from trainer.cli.common import parser_of
from trainer.core import processes
from trainer.core.errors import JOB_FAILED, UserError
from trainer.launch.jobs import states_of
from trainer.launch.launchers import cancel, signal_stop
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import find, reference_to, runs_dir_from
from trainer.runs.state import State, is_alive, state_of
from trainer.supervise.node import request_stop

_POLL_S = 0.2


def main(argv: list[str]) -> int:
    parser = parser_of("stop", "Ask a run to save a checkpoint and end; waits until it has.", "trainer stop k3v9")
    parser.add_argument("--now", action="store_true", help="kill it; goes back to the last checkpoint on resume")
    parser.add_argument("--wait", type=float, default=180.0, metavar="SECONDS", help="how long to wait (180)")
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    state = state_of(run, states_of([run]))
    if not state.is_active:
        raise UserError(
            f"{run.path.name} is not running: {state.name}", f"trainer resume {reference_to(run)} goes on with it"
        )
    request_stop(run, "trainer stop")
    if options.now:
        _kill(run)
    else:
        signal_stop(run)
    state = _wait(run, options.wait)
    if options.json:
        print(json.dumps({"id": run.id, "state": state.name, "reason": state.reason}))
    else:
        print(f"{run.path.name}: {state.name}" + (f" ({state.reason})" if state.reason else ""))
        if not state.is_active:
            print(f"  trainer resume {reference_to(run)} goes on from its last checkpoint")
    return JOB_FAILED if state.is_active else 0


def _kill(run: RunDirectory) -> None:
    launch = run.launch()
    if launch.get("slurm_job_id"):
        cancel(run)
        return
    if not is_alive(run, launch) or launch.get("pid") is None:
        raise UserError(
            "--now can only kill what runs on this machine", f"without --now: trainer stop {reference_to(run)}"
        )
    processes.kill_tree(launch["pid"])


def _wait(run: RunDirectory, timeout_s: float) -> State:
    deadline = time.monotonic() + timeout_s
    while True:
        state = state_of(run, states_of([run]))
        if not state.is_active or time.monotonic() >= deadline:
            return state
        time.sleep(_POLL_S)
