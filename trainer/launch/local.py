"""Launch on this machine. The node process has its own session, so that Ctrl-C reaches only the follower."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

from trainer.config.shape import resolve
from trainer.core import claims, processes
from trainer.core.claims import Claim
from trainer.runs.directory import RunDirectory
from trainer.supervise.node import (
    FOLLOWER_VARIABLE,
    NODES_VARIABLE,
    PEERS_VARIABLE,
    RENDEZVOUS_VARIABLE,
    record_launch,
)

NODE = "trainer.supervise.node"
_started: list[subprocess.Popen[bytes]] = []
"""Kept because a Popen that is garbage-collected while its process runs issues a warning."""


class LocalLauncher:
    """Starts a run on this machine.

    Args:
        detached: The run continues when this process is killed. Otherwise it saves a checkpoint and ends.
    """

    def __init__(self, detached: bool = False) -> None:
        self.detached = detached

    def launch(self, run: RunDirectory) -> None:
        """Start `run`, and write the process id of its node process into `launch.json`.

        Raises:
            EnvironmentFault: Too few GPUs are free.
        """
        launch = run.launch()
        shape = launch.shape or resolve(run.config())
        claim = Claim([], [])
        if shape.device == "cuda":
            claim = claims.claim(shape.processes_per_node, run.config()["resources"].get("devices"))
            print(f"on {claim}", flush=True)
        # A resumed run keeps the working directory of its first launch, to which relative data paths refer.
        attempt = run.next_attempt()
        run.write_launch(replace(launch, cwd=launch.cwd or os.getcwd()))
        record_launch(run, shape, os.getpid(), attempt)  # until the node process exists
        run.stop_request.unlink(missing_ok=True)
        run.logs_dir.mkdir(exist_ok=True)
        # Without it the working directory comes first on sys.path, where a folder may shadow a module.
        variables = {**os.environ, "PYTHONSAFEPATH": "1", "TRAINER_ATTEMPT": str(attempt)}
        for name in (NODES_VARIABLE, RENDEZVOUS_VARIABLE, PEERS_VARIABLE):  # set if this command runs within a job
            variables.pop(name, None)
        if not self.detached:
            variables[FOLLOWER_VARIABLE] = str(os.getpid())
        variables |= claim.variables() if claim.gpus else {}
        with (run.logs_dir / "launch.log").open("ab") as log:
            process = subprocess.Popen(
                processes.python_module(NODE, str(run.path)),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=claim.locks,
            )
        claim.release()  # the node process has them now
        _started.append(process)
        record_launch(run, shape, process.pid, attempt)


def reap() -> None:
    """Wait for the node processes of this process that have ended."""
    _started[:] = [process for process in _started if process.poll() is None]
