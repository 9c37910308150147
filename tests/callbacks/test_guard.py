"""A loss that is no number on one of two ranks, where the update is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.conftest import TrainerCli

STEP = 5
"""Steps completed when the next one goes bad."""
JOB = [
    "experiment=quickstart",
    "callbacks=sample_log",
    "tracking=none",
    "trainer.max_steps=8",
    "trainer.max_epochs=null",
    "trainer.gradient_clip_norm=1.0",
    "data.batch_size=16",
    "data.micro_batch=4",
    "+callbacks.fault._target_=trainer.faultbench.inject.InjectFault",
    "+callbacks.fault.kind=bad_loss",
    f"+callbacks.fault.step={STEP}",
    "+callbacks.fault.ranks=[1]",
]


def only_run(workdir: Path) -> Path:
    (run,) = (workdir / "runs").iterdir()
    return run


def events_of(run: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "not_finite"]


def test_skip_leaves_the_update_out_and_names_rank_parameter_and_samples(
    trainer_cli: TrainerCli, workdir: Path
) -> None:
    done = trainer_cli("fit", *JOB, "resilience.on_nonfinite=skip")
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(workdir)
    (event,) = events_of(run)
    assert (event["step"], event["action"]) == (STEP + 1, "skipped")
    lines = (run / "samples" / "attempt-00-rank-1.jsonl").read_text().splitlines()
    ids = [one for line in lines for one in json.loads(line)["ids"] if json.loads(line)["step"] == STEP]
    assert len(ids) == 8
    assert f"the loss of rank 1 is nan, its samples are {', '.join(map(str, ids))}" in event["reason"]
    assert "the gradient of " in event["reason"]
    state = torch.load(run / "checkpoints" / "step-00000008" / "state.pt", weights_only=True)
    assert all(bool(torch.isfinite(weight).all()) for weight in state["state_dict"].values())
    steps = {int(entry["step"]) for entry in state["optimizer_states"][0]["state"].values()}
    assert steps == {7}  # the optimizer has not seen the bad one


def test_stop_says_so_and_is_not_restarted(trainer_cli: TrainerCli, workdir: Path) -> None:
    done = trainer_cli("fit", *JOB, "checkpoint.every_n_steps=5")
    assert done.returncode == 1
    assert f"step {STEP + 1}: the gradient of " in done.stdout + done.stderr
    run = only_run(workdir)
    assert [path.name for path in (run / "logs").glob("attempt-*")] == ["attempt-00"]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000005"]
