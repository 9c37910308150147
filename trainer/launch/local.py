"""Launch on this machine. The node process has its own session, so that Ctrl-C reaches only the follower."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.shape import resolve
from trainer.core import claims, processes
from trainer.core.claims import Claim
from trainer.core.errors import TrainerError
from trainer.runs.directory import RunDirectory
from trainer.runtime.process import NODE_BEGAN_VARIABLE
from trainer.supervise import entry, rank_environment
from trainer.supervise.agent import PRELOAD_VARIABLE
from trainer.supervise.ahead import NodeAhead
from trainer.supervise.node import record_launch
from trainer.supervise.rank_environment import Interpreter
from trainer.supervise.rendezvous import Place
from trainer.supervise.variables import FOLLOWER_VARIABLE, NODES_VARIABLE, PEERS_VARIABLE, RENDEZVOUS_VARIABLE

NODE = "trainer.supervise.node"
_started: list[subprocess.Popen[bytes]] = []
"""Kept because a Popen that is garbage-collected while its process runs issues a warning."""


class LocalLauncher:
    """Starts a run on this machine.

    Args:
        detached: The run continues when this process is killed. Otherwise it saves a checkpoint and ends.
        ahead: A node process that was started for it while it was checked.
    """

    def __init__(self, detached: bool = False, ahead: NodeAhead | None = None) -> None:
        self.detached, self._ahead = detached, ahead

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
        variables[NODE_BEGAN_VARIABLE] = f"{time.time():.3f}"
        with (run.logs_dir / "launch.log").open("ab") as log:
            if self._ahead and self._ahead.start(str(run.path), variables, log.fileno(), claim.locks):
                process = self._ahead.process
            else:
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


def start_ahead(config: dict[str, Any]) -> NodeAhead | None:
    """Start the node process of a composed job before it is checked; None where nothing is imported ahead."""
    if not sys.platform.startswith("linux") or not os.environ.get(PRELOAD_VARIABLE, "on"):
        return None
    try:
        shape = resolve(config)
    except (TrainerError, KeyError, TypeError, ValueError):  # the check will report it
        return None
    variables = rank_environment.environment(
        os.environ,
        Interpreter(
            code_dir=Path("/nonexistent/code"),
            preload=entry.PRELOAD,
            hash_seed=os.environ.get("PYTHONHASHSEED") or "0",
            expandable_segments=bool(config["trainer"].get("expandable_segments", True)),
        ),
        shape,
        Place(),
        attempt=0,
    )
    return NodeAhead(variables)


def reap() -> None:
    """Wait for the node processes of this process that have ended."""
    _started[:] = [process for process in _started if process.poll() is None]
