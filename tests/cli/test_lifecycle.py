"""A job through every verb: the real command, real processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli, clean_environment, freeze_older_code
from trainer.cli import main
from trainer.runs.directory import RunDirectory

LONG = ["experiment=quickstart", "tracking=none", "trainer.max_steps=1000000", "trainer.max_epochs=null"]


def wait_until(condition: Callable[[], Any], timeout_s: float = 300) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def shown(cli: TrainerCli, *arguments: str) -> Any:
    done = cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def now(*run: str) -> Any:
    """`trainer show --json` of the latest run, asked in this process: a command of its own costs 0.3 s of CPU."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["show", *run, "--json"]) == 0
    return json.loads(said.getvalue())


@pytest.mark.executed
def test_detach_ls_stop_resume_rm(trainer_cli: TrainerCli, workdir: Path) -> None:
    launched = trainer_cli("fit", *LONG, "name=long", "--detach")
    assert launched.returncode == 0, launched.stderr
    wait_until(lambda: now()["step"])
    run = shown(trainer_cli, "show")
    assert (run["state"], run["name"], run["world_size"], run["strategy"]) == ("running", "long", 2, "ddp")
    assert [row["id"] for row in shown(trainer_cli, "ls", "--state", "running")] == [run["id"]]
    assert "long" in trainer_cli("ls", env={"COLUMNS": "60"}).stdout
    assert trainer_cli("resume", "long").returncode == 2
    assert trainer_cli("rm", "long", "--yes").returncode == 2

    stopped = shown(trainer_cli, "stop", run["id"][:5])
    assert stopped["state"] == "stopped"
    run = now("long")
    assert run["state"] == "stopped"
    assert run["checkpoints"][-1]["step"] == run["step"]
    assert run["checkpoints"][-1]["committed"]
    assert "parameters" in trainer_cli("logs", "long").stdout

    refused = trainer_cli("resume", "long", "optimizer.lr=1")
    assert refused.returncode == 2
    assert "optimizer.lr" in refused.stderr
    freeze_older_code(RunDirectory(Path(run["path"])))
    limit = run["step"] + 25
    resumed = trainer_cli("resume", "long", f"trainer.max_steps={limit}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    run = now("long")
    assert (run["state"], run["step"], run["attempts"]) == ("finished", limit, 2)
    assert trainer_cli("resume", "long").returncode == 2

    evaluated = shown(trainer_cli, "evaluate", "long", "--checkpoint", "last")
    assert 0 < evaluated["metrics"]["test/acc"] <= 1
    assert trainer_cli("rm", "long").returncode == 2  # no terminal to ask on
    assert shown(trainer_cli, "rm", "long", "--yes")["deleted"] == [Path(run["path"]).name]
    assert list((workdir / "runs").iterdir()) == []


@pytest.mark.usefixtures("no_orphans")
def test_ctrl_c_saves_and_ends_with_130(trainer_cli: TrainerCli, workdir: Path) -> None:
    follower = subprocess.Popen(
        [sys.executable, "-m", "trainer", "fit", *LONG],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(workdir.glob("runs/*/launch.json")) and now()["step"])
        os.killpg(follower.pid, signal.SIGINT)  # as a terminal does
        output, _ = follower.communicate(timeout=300)
    finally:
        follower.kill()
        follower.wait()
    assert follower.returncode == 130, output
    run = now()
    assert run["state"] == "stopped", output
    assert run["checkpoints"][-1]["step"] == run["step"]
    assert f"trainer resume {run['id']}" in output


def test_kill_9_of_everything_is_dead_and_can_be_resumed(trainer_cli: TrainerCli, workdir: Path) -> None:
    one_rank = ["resources.cpu_processes=1", "checkpoint.every_n_steps=20"]
    assert trainer_cli("fit", *LONG, *one_rank, "--detach").returncode == 0
    wait_until(lambda: any(one["committed"] for one in now()["checkpoints"]))
    launch = json.loads(next((workdir / "runs").glob("*/launch.json")).read_text())
    os.killpg(launch["pid"], signal.SIGKILL)
    assert wait_until(lambda: now()["state"] not in ("running", "starting"))
    run = now()
    assert run["state"] == "dead"
    limit = run["checkpoints"][-1]["step"] + 30
    assert trainer_cli("resume", f"trainer.max_steps={limit}").returncode == 0
    assert now()["step"] == limit
