"""Losses that jump: what is a spike, and what becomes of the update."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.conftest import TrainerCli
from trainer.callbacks.spikes import MIN_LOSSES, LossSpikes

SPIKE = [
    "experiment=quickstart",
    "tracking=none",
    "trainer.max_steps=44",
    "trainer.max_epochs=null",
    "trainer.limit_val_batches=0",
    "checkpoint.every_n_steps=36",
    "resilience.spike_z=20",
    "+callbacks.fault._target_=trainer.faultbench.inject.InjectFault",
    "+callbacks.fault.kind=spike",
    "+callbacks.fault.step=40",
    "+callbacks.fault.ranks=[1]",
]


def test_a_spike_is_measured_by_the_losses_before_it_and_is_none_of_them() -> None:
    spikes = LossSpikes(10.0)
    for step in range(MIN_LOSSES):
        assert spikes.check(2.0 + 0.1 * (step % 3 - 1)) is None
    # median absolute deviation 0.1, so the robust deviation is 0.148
    assert spikes.check(3.4) is None
    said = spikes.check(3.6)
    assert said == "the loss is 3.6, 10.8 robust deviations above 2, the median of 33 steps"
    assert len(spikes.losses) == MIN_LOSSES + 1
    assert spikes.check(0.01) is None  # one that falls is none


def test_the_first_steps_and_equal_losses_are_no_spikes() -> None:
    spikes = LossSpikes(5.0)
    assert spikes.check(1.0) is None
    assert spikes.check(1000.0) is None
    spikes = LossSpikes(5.0)
    assert [spikes.check(1.0 + 1e-4 * (step == MIN_LOSSES)) for step in range(MIN_LOSSES + 1)] == [None] * (
        MIN_LOSSES + 1
    )


def test_a_spike_on_one_rank_is_rolled_back_on_both(trainer_cli: TrainerCli, workdir: Path) -> None:
    done = trainer_cli("fit", *SPIKE, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (workdir / "runs").iterdir()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [one for one in events if one["event"] == "loss_spike"]
    assert (event["step"], event["action"]) == (41, "rolled back")
    assert "robust deviations above" in event["reason"]
    assert "the samples of the step are " in event["reason"]
    assert [one["step"] for one in events if one["event"] == "started"] == [0, 36]
    state = torch.load(run / "checkpoints" / "step-00000044" / "state.pt", weights_only=True)
    assert len(state["callbacks"]["Guard"]["losses"]) == 44  # those of before the rollback, too
