"""A run that has lost a node, and with it the last that it could have, goes on with what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed
from tests.slurm.jobs import on_slurm, paced, submit, wait_for_event, wait_for_step
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated, Started

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
STEPS = 40


def batches(run: RunDirectory) -> dict[tuple[int, int], set[int]]:
    """(epoch, step) to the samples of all ranks, as the last attempt read them."""
    read: dict[tuple[int, int], dict[int, set[int]]] = {}
    for path in (run.path / "samples").glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            attempts = read.setdefault((record["epoch"], record["step"]), {})
            attempts.setdefault(int(path.name.split("-")[1]), set()).update(record["ids"])
    return {place: attempts[max(attempts)] for place, attempts in read.items()}


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    return StoredCheckpoint(CheckpointStore(run.checkpoints_dir).path(STEPS)).whole()


def test_fewer_nodes_train_the_same_global_batches(testbed: Testbed, cli: TrainerCli, workdir: Path) -> None:
    job = [f"trainer.max_steps={STEPS}", "checkpoint.every_n_steps=5", "callbacks=sample_log", "model.dropout=0.0"]
    two_nodes = [*on_slurm(ranks=2), "resources.min_nodes=1", "cluster.exclude='node2,node3'"]
    run = submit(cli, workdir, *job, *two_nodes, *paced(0.5, resumed=False))
    wait_for_step(run, 10)
    first = wait_for_event(run, "allocated")
    assert len(first.nodes) == 2
    testbed("fail", first.nodes[1])
    wait_for_event(run, "finished", 150)
    last = [one for one in run.events_of(Allocated) if one.event == "allocated"][-1]
    assert last.nodes == first.nodes[:1]
    started = run.events_of(Started)
    assert [one.world_size for one in (started[0], started[-1])] == [2, 1]
    assert started[-1].step >= 10
    logs = "".join(path.read_text() for path in run.logs_dir.glob("slurm-*.log"))
    assert "(1 of 2 nodes)" in logs
    assert run.shape().nodes == 2  # what it asks for when it is requeued again

    testbed.mend()
    untouched = submit(cli, workdir, *job, "resources.cpu_processes=2")
    assert batches(run) == batches(untouched)
    ours, theirs = weights(run), weights(untouched)
    assert ours
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
