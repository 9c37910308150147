"""What a resumed attempt refuses of the state that it restored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

from trainer.core.errors import UserError
from trainer.train.resume_callbacks import RequireScheduleLength, prepare


def started(
    schedule: LRScheduler, interval: str, length: float, epochs: int | None = 3, automatic: bool = True
) -> None:
    config = SimpleNamespace(scheduler=schedule, interval=interval, frequency=1)
    trainer: Any = SimpleNamespace(lr_scheduler_configs=[config], estimated_stepping_batches=length, max_epochs=epochs)
    module: Any = SimpleNamespace(automatic_optimization=automatic)
    RequireScheduleLength().on_train_start(trainer, module)


def one_cycle(steps: int) -> OneCycleLR:
    return OneCycleLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0.1, total_steps=steps)


def test_a_one_cycle_schedule_that_is_too_short_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="OneCycleLR of the checkpoint ends after 18 steps, the training after 30"):
        started(one_cycle(18), "step", 30)
    with pytest.raises(UserError, match="ends after 2 epochs, the training after 3"):
        started(one_cycle(2), "epoch", 30)


def test_others_are_not() -> None:
    started(one_cycle(30), "step", 30)
    started(one_cycle(18), "step", float("inf"))
    started(one_cycle(18), "epoch", 30, epochs=-1)
    started(one_cycle(18), "step", 30, automatic=False)
    started(StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1), "step", 30)


def test_only_a_resume_asks() -> None:
    assert prepare([], resumes=False) == []
    assert [type(one) for one in prepare([], resumes=True)] == [RequireScheduleLength]
