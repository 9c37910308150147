"""Runs scripts on real gloo ranks (or on one GPU), bounded in time, and never leaves a process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    variables = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "DS_ACCELERATOR": device,
        "PYTHONPATH": str(HERE.parents[1]),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(HERE / "fork_ranks.py"), str(ranks), str(folder), str(script), *arguments],
        env={**os.environ, **variables},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        code: int | str = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = f"not ended after {timeout_s} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    outputs = [log.read_text() if log.exists() else "it was never started" for log in logs]
    assert code == 0, f"{code}\n" + "\n".join(f"--- rank {n}\n{text[-4000:]}" for n, text in enumerate(outputs))
    return outputs
