from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_commit import save
from tests.runs.test_directory import make
from trainer.checkpoint.store import CheckpointStore
from trainer.config.shape import LaunchShape
from trainer.core import processes
from trainer.core.errors import UserError
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Started
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Launch, Outcome
from trainer.runs.registry import all_runs, find
from trainer.runs.state import state_of
from trainer.runs.summary import summary


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def launched(run: RunDirectory, pid: int, **fields: Any) -> None:
    launch = Launch(
        cluster="local",
        host=socket.gethostname(),
        boot_id=processes.boot_id(),
        pid=pid,
        pid_started=processes.started_ticks(pid),
        shape=LaunchShape(1, 2, "cpu"),
    )
    run.write_launch(replace(launch, **fields))


def ended(run: RunDirectory, attempt: int, outcome: Outcome, **fields: Any) -> None:
    run.write_outcome(AttemptOutcome(attempt=attempt, outcome=outcome, **fields))


def test_a_life_from_start_to_kill_9(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    run = make(tmp_path)
    assert state_of(run).name == "dead"
    launched(run, process.pid)
    assert state_of(run).name == "starting"
    run.add_event(Started(attempt=0, step=0))
    assert state_of(run).name == "running"
    write_atomic(run.stop_request, "me")
    assert state_of(run).name == "stopping"
    run.stop_request.unlink()
    process.kill()
    process.wait()
    assert state_of(run).name == "dead"


def test_a_pid_that_another_process_has_by_now_is_not_the_run(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    run = make(tmp_path)
    launched(run, process.pid, pid_started=1)
    assert state_of(run).name == "dead"
    launched(run, process.pid, boot_id="another boot")
    assert state_of(run).name == "dead"


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        ("finished", "finished"),
        ("stopped", "stopped"),
        ("failed", "failed"),
        ("hung", "failed"),
        ("requeue", "stopped"),
    ],
)
def test_how_it_ended(tmp_path: Path, outcome: Outcome, state: str) -> None:
    run = make(tmp_path)
    launched(run, 2**22 + 1, pid_started=1)
    ended(run, 0, "failed", restarted=True)
    ended(run, 1, outcome, reason="because")
    assert (state_of(run).name, state_of(run).reason) == (state, "because")
    launched(run, 2**22 + 1, pid_started=1, attempt=2)  # launched again, died without a word
    assert state_of(run).name == "dead"


def test_on_another_host_the_heartbeat_is_the_evidence(tmp_path: Path) -> None:
    run = make(tmp_path)
    launched(run, 1, host="elsewhere")
    run.add_event(Started(attempt=0))
    run.write_heartbeat(0, HeartbeatRecord(time=time.time(), phase="train"))
    assert state_of(run).name == "running"
    run.write_heartbeat(0, HeartbeatRecord(time=time.time() - 3600, phase="train"))
    assert state_of(run).name == "dead"


def test_slurm_says_queued_and_requeued(tmp_path: Path) -> None:
    run = make(tmp_path)
    launched(run, 1, host="elsewhere", slurm_job_id="17")
    assert state_of(run, {"17": "PENDING"}).name == "queued"
    ended(run, 0, "requeue")
    assert state_of(run, {"17": "PENDING"}).name == "requeued"
    assert state_of(run, {}).name == "stopped"


def test_finding_by_id_prefix_name_path_job_and_nothing(tmp_path: Path) -> None:
    first, second, third = make(tmp_path, "one"), make(tmp_path, "two"), make(tmp_path, "one")
    for age, run in enumerate([third, second, first]):
        os.utime(run.config_path, (1e9 - age, 1e9 - age))
    launched(second, 1, slurm_job_id="4711")
    runs = tmp_path / "runs"
    assert [run.path for run in all_runs(runs)] == [first.path, second.path, third.path]
    for reference in (second.id, second.path.name, "two", "tw", str(second.path), "4711"):
        assert find(reference, runs).path == second.path
    assert find("one", runs).path == third.path
    assert find(None, runs).path == third.path
    with pytest.raises(UserError, match="matches 2 runs"):
        find("on", runs)
    with pytest.raises(UserError, match=r"there is no run twoo in \S+\n  did you mean two\? trainer ls lists the runs"):
        find("twoo", runs)
    with pytest.raises(UserError, match="no runs"):
        find(None, tmp_path / "nowhere")


def test_the_summary_has_the_promised_keys(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.metrics_path.write_text('{"step": 5, "epoch": 0, "time": 1, "train/loss": 2.0}\n{"step": 10, "val/acc": 0.5}\n')
    found = summary(run)
    promised = [
        "id",
        "name",
        "path",
        "state",
        "step",
        "epoch",
        "metrics",
        "best",
        "attempts",
        "world_size",
        "strategy",
        "wandb_id",
        "slurm_job_id",
        "checkpoints",
        "started",
        "ended",
        "ledger",
        "energy_kwh",
        "cost",
    ]
    assert set(promised) <= set(found)
    assert found["metrics"] == {"train/loss": 2.0, "val/acc": 0.5}
    assert (found["step"], found["attempts"], found["state"]) == (10, 0, "dead")


def test_an_attempt_that_just_starts_stands_where_it_will_go_on(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.write_heartbeat(0, HeartbeatRecord(step=0, phase="start", attempt=0))
    assert summary(run)["step"] == 0
    for step in (20, 40):
        save(CheckpointStore(run.checkpoints_dir), step)
    (run.checkpoints_dir / "step-00000050").mkdir()  # without a COMMIT
    run.write_heartbeat(0, HeartbeatRecord(step=0, phase="start", attempt=1))
    assert summary(run)["step"] == 40
    run.write_heartbeat(0, HeartbeatRecord(step=20, phase="build", attempt=1))
    assert summary(run)["step"] == 20
