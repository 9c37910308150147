"""`trainer sweep` as a command: a sweep that outlives it, kills, stopping, retrying, extending, and what it prints."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from trainer.cli import main
from trainer.core import processes
from trainer.runs.directory import RunDirectory

SMALL = (
    "experiment=quickstart",
    "debug=fast",
    "model.hidden=[8]",
    "tracking=none",
    "resources.gpus=0",
    "resources.cpu_processes=1",
    "trainer.log_every_n_steps=1",
)
BAD = """
import os

from lightning.pytorch import Callback


class Fails(Callback):
    def __init__(self, rate):
        self.rate = rate

    def on_train_batch_end(self, trainer, *arguments):
        if self.rate == 0.002:
            raise ValueError("this trial always fails")
"""


Here = Callable[..., str]


@pytest.fixture
def here(workdir: Path, no_orphans: None, capsys: pytest.CaptureFixture[str]) -> Here:
    """What `trainer ...` prints, run in this process: an eighth of the CPU time where the process is not the point."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        printed = capsys.readouterr()
        assert code == 0, printed.out + printed.err
        return printed.out

    return run


def status(here: Here) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(here("sweep", "status", "--json"))
    return answer


def wait(here: Here, condition: Callable[[dict[str, Any]], Any], timeout_s: float = 300) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while not condition(answer := status(here)):
        assert time.monotonic() < deadline, json.dumps(answer, indent=1)
        time.sleep(0.5)
    return answer


def logs(workdir: Path) -> str:
    return "".join(path.read_text() for path in workdir.glob("sweeps/*/logs/*"))


def test_a_sweep_outlives_its_command_and_the_kill_of_what_trains_it(
    trainer_cli: TrainerCli, here: Here, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "own.py").write_text(BAD)
    job = [*SMALL, "+callbacks.fails._target_=own.Fails", "+callbacks.fails.rate=${optimizer.lr}"]
    job += ["optimizer.lr=0.001,0.002,0.01"]
    job += ["trainer.max_steps=60", "checkpoint.every_n_steps=10", "resilience.max_restarts=0"]
    done = trainer_cli("sweep", *job, "--at-once=2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = Path(json.loads(done.stdout)["path"])
    (workdir / "own.py").write_text("raise RuntimeError('edited after the launch')\n")

    # Kill every slot, mid-training: whatever command comes next starts them again.
    wait(
        here,
        lambda now: any(
            row["run"] and (workdir / "runs" / row["run"] / "live/rank-0.json").exists() for row in now["rows"]
        ),
    )
    killed = 0
    for number in range(2):
        owner = json.loads((sweep / f"trials/{number:05d}.owner-0").read_text())
        if processes.is_alive(owner["pid"], owner["pid_started"]):
            os.kill(owner["pid"], signal.SIGKILL)
            killed += 1
    assert killed
    answer = wait(here, lambda now: now["is_over"])
    assert answer["counts"] == {"finished": 2, "failed": 1}, logs(workdir)
    failed = [row for row in answer["rows"] if row["state"] == "failed"]
    assert all("this trial always fails" in row["reason"] for row in failed)
    assert [row["parameters"]["optimizer.lr"] for row in failed] == ["0.002"]
    runs = [RunDirectory(Path(row["path"])) for row in answer["rows"]]
    assert len({run.path for run in runs}) == 3 == len(list((workdir / "runs").iterdir())), "one run for each trial"
    for run, row in zip(runs, answer["rows"], strict=True):
        assert run.manifest()["sweep"] == {
            "id": answer["id"],
            "name": sweep.name,
            "path": str(sweep),
            "trial": row["trial"],
        }
        if row["state"] == "finished":
            steps = [
                json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines() if "train/loss" in line
            ]
            assert steps == list(range(1, 61)), "each step once, over all attempts"

    # What it prints.
    monkeypatch.setenv("COLUMNS", "80")
    table = here("sweep", "status")
    assert all(len(line) <= 80 for line in table.splitlines()[:6]), table
    assert "2 finished, 1 failed" in table
    listed = list(csv.DictReader(io.StringIO(here("sweep", "status", "--csv"))))
    assert [row["state"] for row in listed] == [row["state"] for row in answer["rows"]]
    best = json.loads(here("sweep", "best", "--json"))
    line = here("sweep", "best", "--overrides").strip()
    assert shlex.split(line) == best["overrides"]
    assert f"optimizer.lr={best['parameters']['optimizer.lr']}" in best["overrides"]
    ranked = [row for row in answer["rows"] if row["values"]]
    first = max(ranked, key=lambda row: (row["values"], -row["trial"]))
    assert best["trial"] == answer["best"]["trial"] == first["trial"]
    assert sweep.name.rpartition("-")[0] in here("sweep", "ls")
    listed = json.loads(here("ls", "--sweep", answer["id"], "--json"))
    assert {row["id"] for row in listed} == {run.id for run in runs}
    assert json.loads(here("ls", "--sweep", "another", "--json")) == []

    # Retried trials run again; others keep their result.
    again = trainer_cli("sweep", "retry", "--trial", str(failed[0]["trial"]))
    assert "1 trial is tried again" in again.stdout
    answer = wait(here, lambda now: now["is_over"])
    assert answer["counts"] == {"finished": 2, "failed": 1}
    assert len(list((workdir / "runs").iterdir())) == 4, "a failed trial is tried again from the start"
    assert "4 runs" in here("sweep", "rm", answer["id"], "--runs", "--yes")
    assert not sweep.exists()
    assert list((workdir / "runs").iterdir()) == []


def test_a_stopped_sweep_is_resumed_and_extended(trainer_cli: TrainerCli, here: Here, workdir: Path) -> None:
    job = [*SMALL, "trainer.max_steps=1500", "checkpoint.every_n_steps=10", "optimizer.lr=interval(0.001,0.1)"]
    done = trainer_cli("sweep", *job, "sweep.trials=2", "sweep.method=random", "--at-once=1")
    assert done.returncode == 0, done.stdout + done.stderr
    wait(here, lambda now: any(row["values"] for row in now["rows"]))
    here("sweep", "stop")
    answer = status(here)
    assert answer["counts"] == {"interrupted": 1, "waiting": 1}, answer
    assert answer["stopped"] == "it was stopped"
    (run,) = [RunDirectory(path) for path in (workdir / "runs").iterdir()]
    stopped_at = run.attempts()[-1].step or 0
    assert 0 < stopped_at < 1500
    by_hand = trainer_cli("resume", run.id, "--detach")  # the sweep must not start it a second time
    assert by_hand.returncode == 0, by_hand.stderr
    done = trainer_cli("sweep", "resume")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = wait(here, lambda now: now["is_over"])
    assert answer["counts"] == {"finished": 2}
    before = [row["parameters"] for row in answer["rows"]]
    assert "1 trial was added" in trainer_cli("sweep", "extend", "--trials=1").stdout
    answer = wait(here, lambda now: now["is_over"])
    assert [row["parameters"] for row in answer["rows"]][:2] == before
    assert len(answer["rows"]) == 3


def test_nothing_is_made_for_a_sweep_with_an_invalid_point(
    here: Here, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *SMALL, "data.batch_size=32,33", "resources.cpu_processes=2"]) == 2
    assert "data.batch_size=33 of this sweep" in capsys.readouterr().err
    assert main(["sweep", *SMALL]) == 2
    assert "no parameter" in capsys.readouterr().err
    assert list(workdir.iterdir()) == []
    planned = here("fit", "-m", *SMALL, "seed=1,2", "sweep.max_gpu_hours=4", "--dry-run")
    assert "grid, 2 points" in planned
    assert "GPU hours 4" in planned
    assert list(workdir.iterdir()) == []
