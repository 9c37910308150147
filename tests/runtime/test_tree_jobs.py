"""Jobs of each kind of strategy over the tree of groups that large jobs use: the same bits as fully connected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.train.in_process import new_run, weights
from trainer.runs.directory import RunDirectory

STRATEGIES = ("ddp", "fsdp", "deepspeed_zero2")
RANKS = 4


def jobs(folder: Path, kind: str) -> dict[str, RunDirectory]:
    """Train a short job under each strategy on four ranks."""
    folder.mkdir()
    runs = {}
    for strategy in STRATEGIES:
        given = [f"strategy={strategy}", f"resources.cpu_processes={RANKS}", "data.batch_size=32", f"name={strategy}"]
        steps = ["trainer.max_steps=4", "trainer.max_epochs=null", "trainer.log_every_n_steps=2"]
        saves = ["checkpoint.every_n_steps=2", "resilience.agree_every_s=0.01", "data.num_workers=0"]
        runs[strategy] = new_run(folder, ["experiment=quickstart", *given, *steps, *saves])
        runs[strategy].attempt_logs(0).mkdir(parents=True)
        arguments = [kind, str(runs[strategy].path)]
        run_ranks(RANKS, Path(__file__).with_name("tree_job_rank.py"), arguments, folder, 120.0)
    return runs


def losses(run: RunDirectory) -> list[Any]:
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, RunDirectory]]:
    folder = tmp_path_factory.mktemp("jobs")
    return {kind: jobs(folder / kind, kind) for kind in ("mesh", "tree")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_job_over_the_tree_trains_saves_and_logs_what_it_does_without(
    trained: dict[str, dict[str, RunDirectory]], strategy: str
) -> None:
    mesh, tree = trained["mesh"][strategy], trained["tree"][strategy]
    used = json.loads((tree.path / "reductions.json").read_text())
    assert used["reduce"] > 2, "the ranks did not agree over the tree"
    assert used["gather"] >= 2, "the random states of a checkpoint were not gathered over the tree"
    assert json.loads((mesh.path / "reductions.json").read_text()) == {"reduce": 0, "gather": 0}
    assert [step for step, _ in losses(tree)] == [2, 4]
    # The means of logged values are summed in another order over the tree; the weights do not pass through it.
    assert losses(tree) == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(mesh)]
    expected, found = weights(mesh), weights(tree)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
