"""What torchrun is told on one node: its arguments, its environment, and how it is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trainer.config.hydra_record import env_set
from trainer.config.shape import LaunchShape
from trainer.core import processes
from trainer.core.hardware import usable_cores
from trainer.core.processes import die_with_parent
from trainer.runs.code_snapshot import import_paths
from trainer.supervise.agent import PRELOAD_VARIABLE

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""torchrun would kill its workers on these, or die of them; the workers handle them, the node forwards them."""


TORCHRUN_PID_VARIABLE = "TRAINER_TORCHRUN_PID"
"""Read by `trainer/runtime/process.py`."""


AGENT = Path(__file__).with_name("agent.py")


@dataclass(frozen=True)
class Place:
    """This node among the nodes of the job."""

    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    """HOST:PORT of the first node; None on a single node."""


def command(
    run_path: Path, job_id: str, shape: LaunchShape, place: Place, max_restarts: int, worker: list[str]
) -> list[str]:
    """The command line of torchrun. `job_id` names this rendezvous: another launch must have another. `worker`: what it
    runs, as Python is told it."""
    if place.nodes == 1:
        rendezvous = ["--standalone", "--local-addr=127.0.0.1"]
    else:
        rendezvous = [
            f"--nnodes={place.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={place.rendezvous}",
            f"--rdzv-id={job_id}",
        ]
    return [
        sys.executable,
        str(AGENT),
        *rendezvous,
        f"--nproc-per-node={shape.processes_per_node}",
        f"--max-restarts={max_restarts}",
        # It installs handlers for the signals listed here, over the inherited SIG_IGN, and needs one at least.
        "--signals-to-handle=SIGQUIT",
        # Each rank writes its own log; without this, folders in the temporary directory stay behind.
        f"--log-dir={os.devnull}",
        *worker,
        str(run_path),
    ]


def environment(
    inherited: Mapping[str, str],
    code_dir: Path,
    shape: LaunchShape,
    place: Place,
    attempt: int,
    preload: str | None = None,
    hash_seed: str = "0",
) -> dict[str, str]:
    """The environment of torchrun and, through it, of the workers. `preload`: the module that is imported once for all
    of them; it and what it imports may start no thread, touch no GPU, and not ask which rank it is. `hash_seed`: of
    `RunDirectory.hash_seed`; a rank that is forked has the one with which the interpreter started."""
    inherited = {**inherited, **env_set(code_dir.parent)}
    variables = dict(inherited)
    variables["PYTHONHASHSEED"] = hash_seed
    threads = max(1, usable_cores(inherited) // shape.processes_per_node)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    variables["TRAINER_ATTEMPT"] = str(attempt)
    variables["PYTHONUNBUFFERED"] = "1"
    # With the store shared, restarted ranks read the addresses of the dead ones and never connect (torch 2.13).
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # The code as it was at launch goes before what the working directory holds by now, and before editable installs,
    # which come last on Python's path. `python -m` would put the working directory first of all; Python 3.11 and later
    # can be told not to (3.10: `process.frozen_code_first`).
    frozen = import_paths(code_dir)
    variables["TRAINER_FROZEN_CODE"] = os.pathsep.join(frozen)  # read by trainer/runtime/frozen.py
    paths = [*frozen, os.getcwd(), *filter(None, [inherited.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    variables["PYTHONSAFEPATH"] = "1"
    if place.nodes == 1:
        # The host name may not resolve, or to an address that is not here: a laptop without a network.
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if shape.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if preload:
        variables.setdefault(PRELOAD_VARIABLE, preload)
    return variables


def start(
    arguments: list[str], variables: dict[str, str], stdout: TextIO | None = None, stderr: TextIO | None = None
) -> subprocess.Popen[bytes]:
    """Start torchrun so that it ignores the signals of stopping and does not outlive this process."""
    parent = os.getpid()

    def before_exec() -> None:
        for signum in IGNORED_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # inherited over exec
        die_with_parent(signal.SIGKILL, parent)
        # Without env=, what is set here is what exec hands on: the only place that knows torchrun's process id.
        # A rank must know it: one that starts while torchrun is being killed sees another parent from the start.
        os.environ.clear()
        os.environ.update(variables)
        os.environ[TORCHRUN_PID_VARIABLE] = str(os.getpid())

    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, preexec_fn=before_exec)


def workers(torchrun_pid: int) -> list[int]:
    """The live ranks of this torchrun. It makes each the leader of a session, which nothing else below it is."""
    return [pid for pid in processes.children(torchrun_pid) if processes.leads_session(pid)]
