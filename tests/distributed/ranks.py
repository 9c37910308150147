"""Starts `job.py` on real gloo ranks, bounded in time, and never leaves a process behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

JOB = Path(__file__).with_name("job.py")


def run_ranks(
    ranks: int, scenarios: list[dict[str, Any]], folder: Path, name: str, timeout_s: float = 280.0, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """The results by scenario name. Raises AssertionError with the ranks' output if one fails or time is up."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / f"{name}.json"
    listed.write_text(json.dumps(scenarios))
    codes, outputs = start(ranks, [sys.executable, str(JOB), str(listed), str(folder)], {}, timeout_s, device)
    assert codes == [0] * ranks, "\n".join(f"--- rank {rank}\n{text[-4000:]}" for rank, text in enumerate(outputs))
    print(outputs[0][-3000:])
    return json.loads((folder / f"results-{name}.json").read_text())


def start(
    ranks: int, command: list[str], environments: dict[int, dict[str, str]], timeout_s: float, device: str = "cpu"
) -> tuple[list[int], list[str]]:
    """Exit codes and output of `command` on each rank. `environments`: more variables of single ranks."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "DS_ACCELERATOR": device,
    }
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environments.get(rank, {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + timeout_s
    outputs = []
    try:
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                process.kill()
                outputs.append(f"killed after {timeout_s} s\n{process.communicate()[0]}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [process.returncode for process in processes], outputs
