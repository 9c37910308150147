"""Online and offline, a run that was killed and went on is one run on the W&B server, with every logged step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.test_resume import KILLER, kill_at
from tests.tracking.wandb_server import WandbServer

JOB = [
    "experiment=quickstart",
    "trainer.max_steps=30",
    "trainer.log_every_n_steps=5",
    "checkpoint.every_n_steps=9",
    "tracking.project=proof",
    "tracking.tags=[a,b]",
    "resources.cpu_processes=1",
    *kill_at(23, [0]),
]
HEADER_BYTES = 7
LOGGED = {5, 10, 15, 20, 25, 30}


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running
        assert running.unknown == []


def only_run(workdir: Path) -> Path:
    (run,) = (workdir / "runs").iterdir()
    return run


def check_served(server: WandbServer, run: Path) -> None:
    """One run with the id of `run`; rows that were logged again after the kill say the same again."""
    (served,) = server.runs.values()
    assert served.id == run.name.rpartition("-")[2]
    assert (served.project, served.name, sorted(served.tags)) == ("proof", run.name, ["a", "b"])
    assert served.config["trainer"]["max_steps"] == 30
    assert served.exit_code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert set(expected) == LOGGED
    rows = [(row["trainer/global_step"], row["train/loss"]) for row in served.history if "train/loss" in row]
    assert {step for step, _ in rows} == LOGGED
    assert all(loss == pytest.approx(expected[step], rel=1e-6) for step, loss in rows)
    numbers = [row["_step"] for row in served.history]
    assert numbers == sorted(set(numbers))


def test_online(trainer_cli: TrainerCli, workdir: Path, server: WandbServer) -> None:
    (workdir / "killer.py").write_text(KILLER)
    done = trainer_cli("fit", *JOB, env=server.environment(), timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    check_served(server, only_run(workdir))
    (served,) = server.runs.values()
    assert served.rows("wandb-summary.json")[-1]["bill/cpu_core_hours"] > 0
    assert not list(only_run(workdir).glob("wandb/offline-run-*"))


def test_offline_and_synced(trainer_cli: TrainerCli, workdir: Path, server: WandbServer) -> None:
    (workdir / "killer.py").write_text(KILLER)
    # There is a key, and a server that would take the rows: WANDB_MODE is obeyed all the same, by both attempts.
    done = trainer_cli("fit", *JOB, env={**server.environment(), "WANDB_MODE": "offline"}, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not server.requests
    run = only_run(workdir)
    shown = trainer_cli("show", run.name)
    assert "W&B offline (WANDB_MODE), project proof" in shown.stdout
    segments = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(segments) == 2
    # The first attempt may have been killed before its file held a row; the second one sends those rows again.
    whole = sum(path.stat().st_size > HEADER_BYTES for path in segments)
    # A process killed at its start leaves a file with a header only, which would end a batch of `wandb sync`.
    empty = run / "wandb" / "offline-run-20200101_000000-none"
    empty.mkdir()
    (empty / "run-none.wandb").write_bytes(segments[0].read_bytes()[:HEADER_BYTES])

    wrong_key = {**server.environment(), "WANDB_API_KEY": "local" + "1" * 40}
    refused = trainer_cli("sync", env=wrong_key, timeout=120)
    assert refused.returncode == 3
    assert "WANDB_API_KEY" in refused.stderr
    assert not server.runs

    # The shell by now is about other runs; and its settings say offline, as W&B's own `wandb sync` may be told.
    shell = {"WANDB_PROJECT": "another", "WANDB_ENTITY": "nobody", "WANDB_MODE": "disabled", "WANDB_RUN_ID": "x"}
    synced = trainer_cli("sync", run.name, env={**shell, **server.environment()}, timeout=120)
    assert (synced.returncode, synced.stdout) == (0, f"{run.name}: {whole} uploaded\n"), synced.stderr
    check_served(server, run)
    again = trainer_cli("sync", "--json", env=server.environment(), timeout=60)
    (found,) = json.loads(again.stdout)
    assert found == {"id": run.name.rpartition("-")[2], "uploaded": 0, "already": whole, "failed": []}
