"""`trainer doctor cluster=slurm`: every node of an allocation is examined; what SLURM sees differently is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import NODES, Testbed, wait_until
from trainer.core.errors import ENVIRONMENT_MUST_CHANGE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_faults_of_slurm_show_on_every_node(cli: TrainerCli, workdir: Path, testbed: Testbed) -> None:
    """The testbed's GPUs exist only for SLURM, and a node is drained."""
    testbed.slurm("scontrol", "update", "nodename=node3", "state=drain", "reason=a broken disk")
    job = ["cluster=slurm", "resources.nodes=2", "cluster.partition=gpu", "tracking=none"]
    done = cli("doctor", "--quick", *job, env={"COLUMNS": "80"}, timeout=200)
    assert done.returncode == ENVIRONMENT_MUST_CHANGE, done.stderr
    out = " ".join(done.stdout.split())
    for node in ("node0", "node1"):
        assert f"{node}: " in out
    assert out.count("SLURM allocated 4 GPUs of this node, 0 can be used") == 2
    assert out.count("node3 drained: a broken disk") == 2
    assert "scontrol update nodename=node3 state=resume" in out
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert list(workdir.iterdir()) == [], "nothing is left behind"


def test_nodes_are_measured_and_exchange_data(cli: TrainerCli, workdir: Path) -> None:
    job = ["cluster=slurm", "resources.nodes=2", "resources.gpus=0", "resources.cpu_processes=2", "tracking=none"]
    cache = {"XDG_CACHE_HOME": str(workdir / "cache")}
    done = cli("doctor", "--json", *job, env=cache, timeout=280)
    report = json.loads(done.stdout)
    assert set(report["nodes"]) == {"node0", "node1"}
    for node in report["nodes"].values():
        assert any(name.startswith("cpu matrix fp32 of") for name in node["measured"])
        (together,) = [one for one in node["findings"] if one["check"] == "all nodes"]
        assert (together["status"], together["text"][:28]) == ("ok", "2 ranks on 2 nodes all-reduc")
    assert [one["check"] for one in report["across"]] == ["comparison"]
    kept = json.loads((workdir / "cache/trainer/baselines/node0.json").read_text())
    assert {"cpu all-reduce of 2 on 2 nodes", "cpu matrix fp32 of rank 0"} <= set(kept["samples"])


def test_a_job_that_does_not_start_is_cancelled(cli: TrainerCli, workdir: Path, testbed: Testbed) -> None:
    testbed.slurm("sbatch", "--parsable", "--exclusive", f"--nodes={NODES}", "--output=/dev/null", "--wrap=sleep 600")
    before = testbed.jobs()
    job = ["cluster=slurm", "resources.gpus=0", "cluster.extra=[exclusive]", "tracking=none"]
    done = cli("doctor", "--quick", *job, "--wait", "0.02", timeout=300)
    assert done.returncode == ENVIRONMENT_MUST_CHANGE
    assert "the job did not start within 0.02 min: " in done.stderr
    assert "--wait MINUTES" in done.stderr
    assert list(workdir.iterdir()) == []
    wait_until(lambda: testbed.jobs() == before)
