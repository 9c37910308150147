"""Start torchrun on one node: its arguments and signals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from trainer.config.shape import LaunchShape
from trainer.core import processes
from trainer.core.processes import die_with_parent
from trainer.supervise.agent import (
    AHEAD_VARIABLE,
    LISTENER_VARIABLE,
    RENDEZVOUS_BACKEND,
    TorchrunJob,
)
from trainer.supervise.ahead import send
from trainer.supervise.rendezvous import Place

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that torchrun ignores: it would kill its workers, or die. The node process forwards them to the workers."""


TORCHRUN_PID_VARIABLE = "TRAINER_TORCHRUN_PID"
"""Process id of the parent of the ranks; read by `trainer/runtime/process.py`."""


AGENT = Path(__file__).with_name("agent.py")


def command(
    run_path: Path,
    job_id: str,
    shape: LaunchShape,
    place: Place,
    *,
    max_restarts: int,
    worker: list[str],
    numa_binding: str | None = None,
) -> list[str]:
    """Return the command line of torchrun.

    Args:
        run_path: Run directory, the argument of the worker.
        job_id: Name of the rendezvous; each launch needs a new one.
        shape: Launch shape.
        place: Position of this node.
        max_restarts: Restarts by torchrun after a rank has died.
        worker: Python's arguments for a rank: `["-m", MODULE]`.
        numa_binding: `resources.numa_binding`; ignored on CPU ranks, which torchrun cannot place.
    """
    endpoint, own = ("127.0.0.1:0", "127.0.0.1")
    if place.link is not None:
        endpoint, own = place.link.server.endpoint, place.link.own.address
    return [
        sys.executable,
        str(AGENT),
        f"--nnodes={place.nodes}",
        f"--rdzv-backend={RENDEZVOUS_BACKEND}",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf=rank={place.node_rank}",
        f"--rdzv-id={job_id}",
        f"--local-addr={own}",
        f"--nproc-per-node={shape.processes_per_node}",
        f"--max-restarts={max_restarts}",
        # torchrun installs handlers for these signals over the inherited SIG_IGN, and needs at least one.
        "--signals-to-handle=SIGQUIT",
        # Each rank writes its own log. By default torchrun leaves folders in the temporary directory behind.
        f"--log-dir={os.devnull}",
        *([f"--numa-binding={numa_binding}"] if numa_binding and shape.device == "cuda" else []),
        *worker,
        str(run_path),
    ]


_spare: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
"""A fork server that imports before it is needed, and the socket on which it waits."""


def start_spare(variables: dict[str, str]) -> None:
    """Start a fork server that the next `start` uses, in the environment that its job will have, as far as known."""
    ours, theirs = socket.socketpair()
    with theirs:
        waits = {**variables, AHEAD_VARIABLE: str(theirs.fileno())}
        child = _popen([sys.executable, str(AGENT)], waits, [theirs.fileno()], subprocess.DEVNULL, subprocess.DEVNULL)
    _spare.append((child, ours))


def start(
    arguments: list[str],
    variables: dict[str, str],
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> subprocess.Popen[bytes]:
    """Start torchrun such that it ignores `IGNORED_SIGNALS` and dies with this process."""
    if _spare and stdout is None and stderr is None:
        child, channel = _spare.pop()
        with channel, contextlib.suppress(OSError):
            given = {**variables, TORCHRUN_PID_VARIABLE: str(child.pid)}
            send(channel, TorchrunJob(arguments=arguments, environment=given, time=time.time()), [1, 2])
            return child
    listener = variables.get(LISTENER_VARIABLE)
    return _popen(arguments, variables, [int(listener)] if listener else [], stdout, stderr)


def _popen(
    arguments: list[str],
    variables: dict[str, str],
    descriptors: list[int],
    stdout: TextIO | int | None,
    stderr: TextIO | int | None,
) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def before_exec() -> None:
        for signum in IGNORED_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # inherited over exec
        die_with_parent(signal.SIGKILL, parent)
        # Without env=, exec passes os.environ on. Only here is torchrun's process id known. A rank needs it: one that
        # starts while torchrun is being killed sees another parent from the start.
        os.environ.clear()
        os.environ.update(variables)
        os.environ[TORCHRUN_PID_VARIABLE] = str(os.getpid())

    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=before_exec,
        pass_fds=descriptors,
    )


def workers(torchrun_pid: int) -> list[int]:
    """Return the live ranks of this torchrun: its children that lead a session."""
    return [pid for pid in processes.children(torchrun_pid) if processes.leads_session(pid)]
