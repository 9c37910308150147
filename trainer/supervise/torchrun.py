"""Start torchrun on one node: its arguments, environment and signals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trainer.config.hydra_record import env_set
from trainer.config.shape import LaunchShape
from trainer.core import processes
from trainer.core.hardware import usable_cores
from trainer.core.network import loopback_interface
from trainer.core.processes import die_with_parent
from trainer.runs.code_snapshot import import_paths
from trainer.runs.node_folder import NODE_FOLDER_VARIABLE
from trainer.runtime.process import FULL_MESH_UP_TO, STORE_VARIABLE
from trainer.supervise import rendezvous
from trainer.supervise.agent import (
    AHEAD_VARIABLE,
    LISTENER_VARIABLE,
    PRELOAD_VARIABLE,
    RENDEZVOUS_BACKEND,
    TOKEN_VARIABLE,
    TorchrunJob,
)
from trainer.supervise.ahead import send
from trainer.supervise.rendezvous import Place

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that torchrun ignores: it would kill its workers, or die. The node process forwards them to the workers."""


TORCHRUN_PID_VARIABLE = "TRAINER_TORCHRUN_PID"
"""Process id of the parent of the ranks; read by `trainer/runtime/process.py`."""


AGENT = Path(__file__).with_name("agent.py")


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """What Python starts with in torchrun and in the ranks."""

    code_dir: Path
    """Code snapshot of the run."""
    preload: str | None = None
    """Module that is imported once for all ranks. While it is imported, no code may start a thread, use a GPU or read
    the number of its rank."""
    hash_seed: str = "0"
    """PYTHONHASHSEED (`RunDirectory.hash_seed`). Forked ranks have that of the process that forks them."""
    expandable_segments: bool = False
    """`trainer.expandable_segments`."""


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


def environment(
    inherited: Mapping[str, str],
    python: Interpreter,
    shape: LaunchShape,
    place: Place,
    *,
    attempt: int,
    store: Path | None = None,
) -> dict[str, str]:
    """Return the environment of torchrun, which the workers inherit.

    Args:
        inherited: Environment of this process.
        python: What Python starts with.
        shape: Launch shape.
        place: Position of this node.
        attempt: Number of the first attempt.
        store: Private folder of this node (`rendezvous.private_folder`): the ranks of a single node find each other
            there, those of several exchange files with their node process.
    """
    inherited = {**inherited, **env_set(python.code_dir.parent)}
    variables = dict(inherited)
    variables["PYTHONHASHSEED"] = python.hash_seed
    threads = max(1, usable_cores(inherited) // shape.processes_per_node)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    variables["TRAINER_ATTEMPT"] = str(attempt)
    variables["PYTHONUNBUFFERED"] = "1"
    # With a shared store, restarted ranks read the addresses of dead ranks and never connect (torch 2.13).
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # The code snapshot comes before the working directory, which may have changed since launch, and before editable
    # installs, which are last on sys.path. `python -m` would insert the working directory first; PYTHONSAFEPATH
    # prevents that since Python 3.11 (3.10: `process.frozen_code_first`).
    frozen = import_paths(python.code_dir)
    variables["TRAINER_FROZEN_CODE"] = os.pathsep.join(frozen)  # read by trainer/runtime/frozen.py
    paths = [*frozen, os.getcwd(), *filter(None, [inherited.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    variables["PYTHONSAFEPATH"] = "1"
    if python.expandable_segments and shape.device == "cuda":
        allow_expandable_segments(variables)
    for name in (STORE_VARIABLE, TOKEN_VARIABLE, LISTENER_VARIABLE, NODE_FOLDER_VARIABLE):  # of a job around this one
        variables.pop(name, None)
    if place.nodes > 1 and store is not None:
        variables[NODE_FOLDER_VARIABLE] = str(store)
    variables |= _network(inherited, place, store)
    if shape.world_size > FULL_MESH_UP_TO:
        variables.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if shape.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if python.preload:
        variables.setdefault(PRELOAD_VARIABLE, python.preload)
    return variables


def allow_expandable_segments(variables: dict[str, str]) -> None:
    """Set the CUDA allocator's `expandable_segments` in the environment of a process that has not used CUDA yet.

    A value that the user has set is kept whole: torch reads PYTORCH_CUDA_ALLOC_CONF first, and the two do not add up.
    """
    if not any(variables.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _network(inherited: Mapping[str, str], place: Place, store: Path | None) -> dict[str, str]:
    """Return the variables for the store of the ranks, and for the interfaces of gloo and NCCL."""
    if place.link is None:
        # On one node nothing listens outside of it, whatever the site has set for jobs on several. Besides, on a laptop
        # without a network the host name may not resolve, or to a foreign address.
        loopback = rendezvous.socket_variables(loopback_interface(), chosen=True)
        return loopback | ({STORE_VARIABLE: f"file:{store}"} if store else {})
    chosen = rendezvous.socket_variables(place.interface, chosen=True)
    found = rendezvous.socket_variables(place.link.own.interface, chosen=False)
    variables = chosen or {name: value for name, value in found.items() if name not in inherited}
    token = place.link.server.token
    variables |= {STORE_VARIABLE: f"tcp:{token}", TOKEN_VARIABLE: token}
    if place.link.listener is not None:
        variables[LISTENER_VARIABLE] = str(place.link.listener.fileno())
    return variables


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
