"""A job script that an older release rendered calls modules by names that have moved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment
from trainer.runs.directory import RunDirectory

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "older-abcdefgh")
    for folder in (run.attempts_dir, run.logs_dir, run.checkpoints_dir, run.stop_request.parent):
        folder.mkdir(parents=True)
    run.config_path.write_text("{checkpoint: {keep_best: 1}, data: {}}\n")
    shape = {"nodes": 1, "processes_per_node": 1, "device": "cpu"}
    run.launch_path.write_text(json.dumps({"cluster": "slurm", "shape": shape, "slurm_job_id": "7"}))
    return run


def call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, env={**clean_environment(), **JOB}, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_node_process(run: RunDirectory) -> None:
    done = call("trainer.cluster.node", str(run.path), "--nodes", "2")
    assert done.returncode == 1
    assert "add --rendezvous HOST:PORT" in done.stderr


def test_begin_of_an_attempt(run: RunDirectory) -> None:
    run.stop_request.write_text("the user\n")
    done = call("trainer.cluster.slurm.attempt", "begin", str(run.path))
    assert (done.returncode, done.stdout) == (0, "exit 0\n"), done.stderr
    assert [record.outcome for record in run.attempts()] == ["stopped"]


def test_the_preflight(run: RunDirectory) -> None:
    done = call("trainer.cluster.slurm.preflight", str(run.path), "n1")
    assert done.returncode == 0, done.stderr
    record = json.loads((run.path / "preflight" / "7-0" / "n1.json").read_text())
    assert (record["node"], record["problems"]) == ("n1", [])
