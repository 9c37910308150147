"""Runs scripts on real gloo ranks (or on one GPU), bounded in time, and never leaves a process behind."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import MARK
from tests.distributed.fork_ranks import Request

HERE = Path(__file__).parent
JOB = HERE / "job.py"


def run_scenarios(
    ranks: int, scenarios: list[dict[str, Any]], folder: Path, name: str, timeout_s: float = 800.0, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """The results of `job.py` by scenario name. Raises AssertionError with the ranks' output if one fails."""
    listed = folder / f"{name}.json"
    listed.write_text(json.dumps(scenarios))
    outputs = run_ranks(ranks, JOB, [str(listed), str(folder)], folder, timeout_s, device)
    print(outputs[0][-3000:])
    return json.loads((folder / f"results-{name}.json").read_text())


def run_ranks(
    ranks: int, script: Path, arguments: list[str], folder: Path, timeout_s: float, device: str = "cpu"
) -> list[str]:
    """The output of `script` on each rank. Raises AssertionError with all of it if one fails or time is up."""
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    request: Request = {
        "ranks": ranks,
        "folder": str(folder),
        "script": str(script),
        "arguments": arguments,
        "cwd": os.getcwd(),
        "environment": {**os.environ, **_variables(device), **group, "TORCHELASTIC_RUN_ID": "test"},
    }
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    for log in logs:
        log.unlink(missing_ok=True)
    code = _ask(device, request, timeout_s)
    outputs = [log.read_text() if log.exists() else "it was never started" for log in logs]
    assert code == "0", f"{code}\n" + "\n".join(f"--- rank {n}\n{text[-4000:]}" for n, text in enumerate(outputs))
    return outputs


_servers: dict[str, subprocess.Popen[str]] = {}
"""Device to this process's own `fork_ranks.py`, kept for the tests that follow: it takes 5 s of CPU to import."""


def _ask(device: str, request: Request, timeout_s: float) -> str:
    """The exit code, or why there is none: then the server has ended, and its ranks with it."""
    server = _servers.pop(device, None) or _start(device)
    assert server.stdin
    assert server.stdout
    reply = ""
    try:
        print(json.dumps(request), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], timeout_s)[0]:
            return f"not ended after {timeout_s} s"
        reply = server.stdout.readline().strip()
        return reply or "fork_ranks.py has ended"
    finally:
        if reply:
            _servers[device] = server
        else:
            _end(server)


def _start(device: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != MARK}  # it stays after this test
    return subprocess.Popen(
        [sys.executable, str(HERE / "fork_ranks.py"), str(os.getpid())],
        env={**environment, **_variables(device)},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _variables(device: str) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
        "PYTHONPATH": str(HERE.parents[1]),
        "PYTHONUNBUFFERED": "1",
    }


def _end(server: subprocess.Popen[str]) -> None:
    with server:  # closes its pipes and waits for it
        os.killpg(server.pid, signal.SIGKILL)


@atexit.register
def _end_all() -> None:
    for server in _servers.values():
        _end(server)
