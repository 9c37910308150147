"""W&B online from the nodes of a cluster: one W&B run over a requeue, row for row what `metrics.jsonl` has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed, wait_until
from tests.slurm.jobs import on_slurm, paced, story, submit, wait_for_event
from tests.tracking.wandb_server import ServedRun, WandbServer
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Tracking

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
STEPS = 40


def test_one_curve_over_a_requeue(testbed: Testbed, cli: TrainerCli, workdir: Path) -> None:
    options = [f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=15"]
    options += ["tracking.name=wandb", "tracking.mode=online", *on_slurm(ranks=2), *paced(0.5, resumed=False)]
    with WandbServer(host=testbed.host) as server:
        run = submit(cli, workdir, *options, env=server.environment())
        wait_until(lambda: server.runs and len(served(server).history) >= 3, 240, lambda: story(run))
        testbed.slurm("scontrol", "requeue", str(run.launch().slurm_job_id))
        wait_for_event(run, "finished", 300)
        wait_until(lambda: served(server).exit_code is not None, 60, lambda: story(run))
        assert server.unknown == []
        check_rows(run, served(server))
    assert [event.mode for event in run.events_of(Tracking)] == ["online", "online"]  # one for each attempt
    assert list(run.wandb_dir.glob("offline-run-*")) == []


def served(server: WandbServer) -> ServedRun:
    (one,) = server.runs.values()
    return one


def check_rows(run: RunDirectory, found: ServedRun) -> None:
    """The history is metrics.jsonl, with the load of both nodes in each row of training."""
    rows = [
        {name: value for name, value in row.items() if not name.startswith("_") and name != "epoch"}
        for row in found.history
    ]
    steps = [row.pop("trainer/global_step") for row in rows]
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS
    assert found.exit_code == 0
    merged: dict[int, dict[str, float]] = {}
    for step, row in zip(steps, rows, strict=True):
        assert not row.keys() & merged.get(step, {}).keys(), f"step {step} was sent twice"
        merged.setdefault(step, {}).update(row)
    assert list(merged) == [line["step"] for line in lines]
    for line in lines:
        logged = {name: value for name, value in line.items() if name not in ("step", "time", "epoch")}
        assert merged[line["step"]] == pytest.approx(logged, rel=1e-6)
        if "train/loss" in line:
            assert {f"system/node-{node}/memory_gb" for node in range(2)} <= logged.keys()
