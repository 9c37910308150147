"""Memory that runs out on one of two ranks: who holds it, and the same batches in smaller parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TrainerCli
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.config.batch import BatchPlan
from trainer.faultbench.compare import samples
from trainer.runtime.micro_batch import smaller

JOB = [
    "experiment=quickstart",
    "callbacks=sample_log",
    "tracking=none",
    "trainer.max_steps=12",
    "trainer.max_epochs=null",
    "trainer.limit_val_batches=0",
    "checkpoint.every_n_steps=5",
    "data.batch_size=24",
    "model.dropout=0.0",
]
FAULT = [
    "+callbacks.fault._target_=trainer.faultbench.inject.InjectFault",
    "+callbacks.fault.kind=out_of_memory",
    "+callbacks.fault.step=7",
    "+callbacks.fault.ranks=[1]",
]


@pytest.mark.parametrize(
    ("batch", "micro", "half"), [(64, None, 16), (24, None, 6), (24, 3, 1), (20, 5, 2), (64, 1, None)]
)
def test_half_or_what_divides_the_share_of_a_rank(batch: int, micro: int | None, half: int | None) -> None:
    assert smaller(BatchPlan.of(batch, micro, 2)) == half


def run_of(workdir: Path, name: str) -> Path:
    (run,) = (workdir / "runs").glob(f"{name}-*")
    return run


def events_of(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == event]


def test_halved_micro_batches_read_the_same_samples_to_the_same_end(trainer_cli: TrainerCli, workdir: Path) -> None:
    """With ZeRO-2, which by itself divides the gradients once more than it should, as whole batches with DDP."""
    zero = "strategy=deepspeed_zero2"
    whole = trainer_cli("fit", *JOB, "strategy=ddp", "name=whole", timeout=120)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    done = trainer_cli("fit", *JOB, *FAULT, zero, "name=short", "resilience.on_oom=halve", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    run, reference = run_of(workdir, "short"), run_of(workdir, "whole")
    (event,) = events_of(run, "out_of_memory")
    assert (event["rank"], event["micro_batch"], event["batch_size"]) == (1, 6, 24)
    assert "with a micro-batch of 12: on this rank optimizer state " in event["reason"]
    log = (run / "logs" / "attempt-01" / "rank-0.log").read_text()
    assert "resumed from step 5" in log
    assert "2 ranks x 6 x 2 accumulated" in log
    # The ids of a step come in two parts, but in the same order; the epoch was entered after an odd number of steps.
    assert samples(run) == samples(reference)
    stored = [StoredCheckpoint(CheckpointStore(one / "checkpoints").path(12)) for one in (run, reference)]
    weights = [one.whole() for one in stored]
    assert weights[0]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)
    progress = stored[0].state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert progress["ready"] == 24  # two a step, also of those before the change


def test_without_the_policy_the_job_ends_and_says_who_holds_the_memory(trainer_cli: TrainerCli, workdir: Path) -> None:
    done = trainer_cli("fit", *JOB, *FAULT, "name=short")
    assert done.returncode == 1
    run = run_of(workdir, "short")
    assert [path.name for path in (run / "logs").glob("attempt-*")] == ["attempt-00"]
    said = trainer_cli("why").stdout
    assert "rank 1 on " in said
    assert "ran out of memory with a micro-batch of 12: on this rank optimizer state " in said
    assert "resilience.on_oom=halve" in said
