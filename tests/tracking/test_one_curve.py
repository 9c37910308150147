"""Online and offline, a run that was killed and went on is one run on the W&B server, with every logged step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from tests.hardware.powercap import Powercap
from tests.report.made import Page
from tests.test_resume import KILLER, kill_at
from tests.tracking.wandb_server import ServedRun, WandbServer
from trainer.runs import bill_text
from trainer.runs.directory import RunDirectory

JOB = [
    "experiment=quickstart",
    "trainer.max_steps=30",
    "trainer.log_every_n_steps=5",
    "checkpoint.every_n_steps=9",
    "tracking.project=proof",
    "tracking.tags=[a,b]",
    "resources.cpu_processes=2",
    "trainer.val_check_interval=10",
    *kill_at(23, [0]),
]
HEADER_BYTES = 7
PARTS, AXIS = ("train/", "val/"), "trainer/global_step"
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
    """One run with the id of `run`, whose rows are the lines of metrics.jsonl: each once, in order."""
    (served,) = server.runs.values()
    assert served.id == run.name.rpartition("-")[2]
    assert (served.project, served.name, sorted(served.tags)) == ("proof", run.name, ["a", "b"])
    assert served.config["trainer"]["max_steps"] == 30
    assert served.exit_code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(line["step"], name, line[name]) for line in lines for name in line if name.startswith(PARTS)]
    found = [(row[AXIS], name, row[name]) for row in served.history for name in row if name.startswith(PARTS)]
    assert {step for step, name, _ in found if name == "train/loss"} == LOGGED
    assert [step for step, _, _ in found] == sorted(step for step, _, _ in found)
    assert len(found) == len({(step, name) for step, name, _ in found})
    assert {(step, name): value for step, name, value in found if "_per_s" not in name} == pytest.approx(
        {(step, name): value for step, name, value in expected if "_per_s" not in name}, rel=1e-6
    )
    assert {(step, name) for step, name, _ in found} == {(step, name) for step, name, _ in expected}
    numbers = [row["_step"] for row in served.history]
    assert numbers == sorted(set(numbers))
    check_told(served, lines)


def check_told(served: ServedRun, lines: list[dict[str, Any]]) -> None:
    """What the W&B run tells besides its rows."""
    about = served.config["about"]
    assert about["command"].startswith("trainer fit experiment=quickstart ")
    assert "trainer.max_steps=30" in about["overrides"]
    assert about["choices"]["experiment"] == "quickstart"
    assert about["parameters"] == about["trainable_parameters"] > 1000
    assert about["packages"]["torch"]
    assert {"host", "python", "cpu", "cores", "world_size", "user"} <= set(about)
    metadata = json.loads(served.files["wandb-metadata.json"])
    assert metadata["args"][:2] == ["fit", "experiment=quickstart"]
    assert metadata["program"].endswith("trainer")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    accuracies = [line["val/acc"] for line in lines if "val/acc" in line]
    assert served.summary["min/train/loss"] == pytest.approx(min(losses), rel=1e-6)
    assert served.summary["max/train/loss"] == pytest.approx(max(losses), rel=1e-6)
    assert served.summary["best/val/acc"] == pytest.approx(max(accuracies), rel=1e-6)
    assert served.summary["best/val/loss"] == served.summary["min/val/loss"]  # not monitored: by its name
    assert "parameters, ddp on" in served.log or "parameters, single on" in served.log


def check_billed(run: Path, bill: dict[str, Any], served: ServedRun, trainer_cli: TrainerCli) -> None:
    """Both attempts, one of which was killed, are in each of the bills."""
    killed, finished = RunDirectory(run).usage()
    assert bill["cost"] == pytest.approx(killed.devices * (killed.seconds + finished.seconds), rel=1e-5)
    (listed,) = json.loads(trainer_cli("ls", "--cost", "--json").stdout)
    sums = ("cpu_core_hours", "energy_kwh", "co2_kg")
    assert {key: listed[key] for key in sums} == {key: bill[key] for key in sums}
    assert listed["cost"] == [{"amount": pytest.approx(bill["cost"]), "currency": "EUR"}]
    used = bill_text.energy(bill["energy_kwh"]), bill_text.money(bill["cost"], None)
    assert f"100% {bill['cpu_core_hours']:.3g} {' '.join(used)} " in Page((run / "report.html").read_text()).text
    # The rank logs it before the node process reads the counters for the last time.
    assert killed.devices * killed.seconds < served.summary["bill/cost"] <= bill["cost"]
    for key in sums:
        assert 0 < served.summary[f"bill/{key}"] <= bill[key]


def test_online(trainer_cli: TrainerCli, workdir: Path, server: WandbServer) -> None:
    (workdir / "killer.py").write_text(KILLER)
    done = trainer_cli("fit", *JOB, env=server.environment(), timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    check_served(server, only_run(workdir))
    (served,) = server.runs.values()
    assert served.rows("wandb-summary.json")[-1]["bill/cpu_core_hours"] > 0
    url = f"{server.url}/somebody/proof/runs/{served.id}"
    assert f"  W&B     {url}" in done.stdout
    shown = json.loads(trainer_cli("show", "--json").stdout)
    listed = json.loads(trainer_cli("ls", "--json").stdout)
    for facts in (shown, listed[0]):
        assert facts["wandb"]["url"] == url
        assert (facts["wandb"]["entity"], facts["wandb"]["project"], facts["wandb_id"]) == (
            "somebody",
            "proof",
            served.id,
        )
    assert url in trainer_cli("show").stdout
    assert not list(only_run(workdir).glob("wandb/offline-run-*"))


def test_offline_and_synced(trainer_cli: TrainerCli, workdir: Path, server: WandbServer) -> None:
    (workdir / "killer.py").write_text(KILLER)
    # There is a key, and a server that would take the rows: WANDB_MODE is obeyed all the same, by both attempts.
    prices = ["cluster.price_per_cpu_core_hour=3600", "cluster.currency=EUR", "cluster.grid_gco2_per_kwh=360"]
    with Powercap(workdir, {0: len(os.sched_getaffinity(0))}).using(watts=100) as read_by:
        environment = {**server.environment(), **read_by, "WANDB_MODE": "offline"}
        done = trainer_cli("fit", *JOB, *prices, env=environment, timeout=180)
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
    (served,) = server.runs.values()
    url = f"{server.url}/somebody/proof/runs/{served.id}"
    told = f"{run.name}: {whole} uploaded, {len(served.history)} rows accepted: {url}\n"
    assert (synced.returncode, synced.stdout) == (0, told), synced.stderr
    check_served(server, run)
    shown = json.loads(trainer_cli("show", "--json").stdout)
    assert shown["wandb"]["url"] == url
    check_billed(run, shown["bill"], served, trainer_cli)
    again = trainer_cli("sync", "--json", env=server.environment(), timeout=300)
    (found,) = json.loads(again.stdout)
    expected = {"id": run.name.rpartition("-")[2], "uploaded": 0, "already": whole, "failed": []}
    assert found == {**expected, "rows": None, "served": None}
