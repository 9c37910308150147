"""`wandb agent` where its trials are jobs on nodes without a network: offline, and uploaded to the trial's W&B run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TrainerCli, clean_environment
from tests.slurm.conftest import Testbed
from tests.slurm.jobs import JOB, on_slurm
from tests.tracking.wandb_server import ENTITY, WandbServer

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_trial_on_a_node(testbed: Testbed, cli: TrainerCli, workdir: Path) -> None:
    options = [*JOB, *on_slurm(ranks=1, nodes=1), "tracking=wandb", "tracking.init_timeout_s=1", "trainer.max_steps=30"]
    command = [sys.executable, "-m", "trainer", "fit", *options, "${args_no_hyphens}"]
    sweep = {"method": "grid", "parameters": {"optimizer.lr": {"values": [0.01]}}, "command": command}
    with WandbServer() as server:
        name = server.add_sweep(sweep, "proof")
        environment = {**clean_environment(), **server.environment(), "HOME": str(workdir)}
        agent = subprocess.run(
            [sys.executable, "-m", "wandb", "agent", f"{ENTITY}/proof/{name}"],
            cwd=workdir,
            env={**environment, "SLURM_CONF": testbed.conf},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        (run,) = (workdir / "runs").iterdir()
        assert '"event": "finished"' in (run / "events.jsonl").read_text(), agent.stdout  # the agent has waited for it
        record = json.loads((run / "wandb.json").read_text())
        assert (record["id"], record["project"], record["sweep_id"]) == (f"{name}run0", "proof", name)
        assert json.loads(cli("show", "--json").stdout)["wandb_id"] == f"{name}run0"
        assert f"sweep {name}" in cli("show").stdout
        synced = cli("sync", run.name, env=server.environment(), timeout=120)
        assert synced.returncode == 0, synced.stdout + synced.stderr
        (served,) = server.runs.values()
        assert (served.id, served.project, served.sweep) == (f"{name}run0", "proof", name)
        assert served.config["about"]["slurm_job_id"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
        rows = {row["trainer/global_step"]: row["train/loss"] for row in served.history if "train/loss" in row}
        assert rows == pytest.approx(losses, rel=1e-6)
        assert server.unknown == []
