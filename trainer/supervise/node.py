"""Run one node of a job, alone, under srun or by hand: `python -m trainer.supervise.node RUN_DIR`.

The node process records itself in `launch.json`, handles signals, has `supervisor.py` start and watch torchrun, and
turns the outcome that the workers recorded into the exit code of the job (`trainer/core/errors.py`).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.config.shape import LaunchShape, resolve
from trainer.core import claims, processes, records
from trainer.core.claims import CLAIMED_VARIABLE
from trainer.core.errors import TrainerError
from trainer.core.install import refuse_malicious
from trainer.runs import trust
from trainer.runs.directory import RunDirectory
from trainer.runs.ending import seal_ended
from trainer.runs.lock import RunLock
from trainer.supervise.rendezvous import Place
from trainer.supervise.supervisor import Supervisor
from trainer.supervise.variables import (
    FOLLOWER_VARIABLE,
    NODES_VARIABLE,
    PEERS_VARIABLE,
    RENDEZVOUS_VARIABLE,
    THEN_VARIABLE,
)


def record_launch(run: RunDirectory, shape: LaunchShape, pid: int, attempt: int) -> None:
    """Write the process of the run into `launch.json`, from which its state is read even after a crash.

    Args:
        run: The run.
        shape: Requested launch shape.
        pid: Process id of the node process.
        attempt: Number of the first attempt of this launch; restarts by torchrun continue the count.
    """
    before = run.launch()
    launch = replace(
        before,
        cluster=before.cluster or "local",
        shape=shape,
        host=socket.gethostname(),
        boot_id=processes.boot_id(),
        pid=pid,
        pid_started=processes.started_ticks(pid),
        attempt=attempt,
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
    )
    run.write_launch(launch)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/node", description="Run this node's part of a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--nodes", type=int, help="number of nodes of the job; default: that of the run")
    parser.add_argument("--node-rank", type=int, help="number of this node, from 0")
    parser.add_argument("--rendezvous", help="HOST or HOST:PORT of the first node, the same on every node")
    parser.add_argument("--interface", help="network interface between the nodes, such as ib0; default: found by route")
    parser.add_argument("--local-addr", help="address of this node on the network between the nodes")
    return parser.parse_args(arguments)


def _place(options: argparse.Namespace, shape: LaunchShape, config: dict[str, Any]) -> Place:
    nodes = options.nodes or int(os.environ.get(NODES_VARIABLE) or shape.nodes)
    rank = options.node_rank
    if rank is None:
        rank = int(os.environ.get("SLURM_NODEID", "0"))
    rendezvous = options.rendezvous or os.environ.get(RENDEZVOUS_VARIABLE)
    if nodes > 1 and not rendezvous:
        sys.exit(
            f"error: {nodes} nodes need a rendezvous\n  add --rendezvous HOST:PORT (or HOST) of node 0 on every node"
        )
    return Place(
        nodes,
        rank,
        rendezvous,
        peers=tuple(filter(None, os.environ.get(PEERS_VARIABLE, "").split(","))),
        interface=options.interface or config["cluster"].get("network_interface"),
        address=options.local_addr,
    )


def _handle_signals(node: Supervisor, follower: int | None) -> None:
    """Forward SIGTERM and SIGUSR1. Ctrl-C stops the run; a second one kills it."""

    def forward(signum: int, frame: FrameType | None) -> None:
        if follower is not None and os.getppid() != follower:
            node.run.request_stop("the command that followed this run was killed")
        node.requested.add(signal.SIGTERM if signum == signal.SIGHUP else signum)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if node.run.stop_request.exists():
            processes.kill_tree(os.getpid())
        node.run.request_stop("Ctrl-C")

    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, forward)
    signal.signal(signal.SIGINT, interrupt)


def main(arguments: list[str] | None = None) -> int:
    """Run this node's part of the run, and return the exit code of the job."""
    options = _parse(arguments)
    refuse_malicious()
    run = RunDirectory(options.run_dir.resolve())
    launch = run.launch()
    trust.require(run, launch.trusted)
    shape = launch.shape or resolve(run.config())
    place = _place(options, shape, run.config())
    lock = RunLock(run)
    if place.node_rank == 0:
        lock.take(run.next_attempt())
    node = Supervisor(run, LaunchShape(place.nodes, shape.processes_per_node, shape.device), place)
    follower = os.environ.pop(FOLLOWER_VARIABLE, None)
    _handle_signals(node, int(follower) if follower else None)
    if follower:
        processes.die_with_parent(signal.SIGTERM, int(follower))
    if launch.cwd and os.path.isdir(launch.cwd):
        os.chdir(launch.cwd)
    if shape.device == "cuda" and CLAIMED_VARIABLE not in os.environ and "SLURM_JOB_ID" not in os.environ:
        # Started by hand. The locks are held until this process ends.
        claim = claims.claim(shape.processes_per_node, node.config["resources"].get("devices"))
        os.environ.update(claim.variables())
    if place.node_rank == 0:
        # After an attempt on fewer nodes, the next one requests the shape of the run again.
        requested = replace(shape, nodes=options.nodes) if options.nodes else shape
        record_launch(run, requested, os.getpid(), node.base)
    terminal = _redirect_output(node.node_log)
    code = node.supervise()
    if place.node_rank == 0:
        from trainer.report import write  # only at the end

        write.at_end(run, on_slurm=False)
    print(f"node {place.node_rank} ends with code {code}", flush=True)
    if place.nodes == 1 and "SLURM_JOB_ID" not in os.environ:  # else slurm/attempt.py, or a reader once all have ended
        seal_ended(run)
    try:
        os.write(terminal, f"attempt {node.attempt} ended with code {code}; log: {node.node_log}\n".encode())
    except OSError:  # the terminal or pipe is closed
        pass
    return code


def _redirect_output(log: Path) -> int:
    """Redirect stdout and stderr to `log`; return a descriptor of the former stdout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.dup(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    return terminal


def main_then() -> int:
    """Run `main`, then the command of THEN_VARIABLE in place of this process, in the environment that it had."""
    written, environment = os.environ.pop(THEN_VARIABLE, None), dict(os.environ)
    then: list[str] = []
    try:
        if written is not None:
            then = records.loads(list[str], written, f"the variable {THEN_VARIABLE}")
        code = main()
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.code
    if then:
        os.execve(then[0], then, environment)
    return code


if __name__ == "__main__":
    sys.exit(main_then())
