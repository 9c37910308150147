"""`trainer stop [RUN]`: save a checkpoint and stop the run."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from trainer.cli.options import add_output_options, add_run, make_parser
from trainer.core import processes
from trainer.core.errors import DONE, JOB_FAILED, UserError
from trainer.launch.jobs import states_of
from trainer.launch.launchers import cancel, signal_stop
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Launch
from trainer.runs.registry import find, reference_to, runs_dir_from
from trainer.runs.state import State, state_of
from trainer.runs.trust import require

_POLL_S = 0.2
_NODES = {"trainer.supervise.node", "trainer.cluster.node"}
"""Modules of the node process; the second until 0.1."""
_AHEAD = "trainer.supervise.ahead"
"""Module of one that was started before its run existed (`trainer/supervise/ahead.py`)."""


_DESCRIPTION = (
    "Ask a run to save a checkpoint and stop, and wait until it has. A stopped run is not requeued; `trainer resume` "
    "resumes it. The exit code is 1 if the run is still active after the wait."
)


def main(argv: list[str]) -> int:
    """Run `trainer stop` and return the exit code."""
    parser = make_parser("stop", _DESCRIPTION, "trainer stop k3v9")
    add_run(parser)
    parser.add_argument(
        "--now",
        action="store_true",
        help="kill the job without saving; the steps since the last checkpoint are lost",
    )
    parser.add_argument("--wait", type=float, default=180.0, metavar="SECONDS", help="seconds to wait (default: 180)")
    add_output_options(parser)
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    require(run, trusted=True)  # what is written into it stays in it
    state = state_of(run, states_of([run]))
    if not state.is_active:
        raise UserError(
            f"{run.path.name} is not running: {state.name}", f"resume it with: trainer resume {reference_to(run)}"
        )
    run.request_stop("trainer stop")
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
            print(f"  resume from its last checkpoint: trainer resume {reference_to(run)}")
    return JOB_FAILED if state.is_active else DONE


def is_node_process(run: RunDirectory, launch: Launch) -> bool:
    """Return whether the process in `launch.json` trains this run: pid, start time, command line or log.

    The file alone is not enough: with another pid in it, another process of the user would be killed.
    """
    is_here = launch.host == socket.gethostname() and launch.boot_id == processes.boot_id()
    if not is_here or launch.pid is None or launch.pid_started is None:
        return False
    line = processes.command_line(launch.pid)
    if _AHEAD in line:  # it names no run, but writes to the log of its run
        runs_this = _is_same(f"/proc/{launch.pid}/fd/1", run.logs_dir / "launch.log")
    else:
        runs_this = _NODES & set(line) != set() and any(one and _is_same(one, run.path) for one in line)
    return runs_this and processes.is_alive(launch.pid, launch.pid_started)


def _is_same(argument: str, path: Path) -> bool:
    try:
        if not Path(argument).is_absolute():  # started by hand, from a folder that it has left
            return Path(argument).name == path.name
        return os.path.samefile(argument, path)
    except (OSError, ValueError):
        return False


def _kill(run: RunDirectory) -> None:
    launch = run.launch()
    if launch.slurm_job_id:
        cancel(run)
        return
    if launch.pid is None or not is_node_process(run, launch):
        raise UserError(
            "--now can only kill jobs of this machine and of SLURM, and launch.json names no process of this run here",
            f"stop it without --now: trainer stop {reference_to(run)}",
        )
    processes.kill_tree(launch.pid)


def _wait(run: RunDirectory, timeout_s: float) -> State:
    deadline = time.monotonic() + timeout_s
    while True:
        state = state_of(run, states_of([run]))
        if not state.is_active or time.monotonic() >= deadline:
            return state
        time.sleep(_POLL_S)
