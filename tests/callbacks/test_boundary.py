"""When the ranks agree, and when they act on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed

from trainer.callbacks import boundary
from trainer.callbacks.boundary import SHORT_STEPS, Boundary
from trainer.config.schema import CheckpointOptions, ResilienceOptions
from trainer.worker.stop import Request, StopTraining


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Job:
    """A training without a training: `step()` is an optimizer step that took `step_s`."""

    def __init__(self, folder: Path, clock: Clock, group: Any, step_s: float, **options: Any) -> None:
        self.saved: list[int] = []
        self.failed = False
        self.trainer: Any = SimpleNamespace(global_step=0, should_stop=False)
        self.clock, self.step_s = clock, step_s
        self.stop_request = folder / "stop"
        save = lambda trainer: self.saved.append(trainer.global_step)  # noqa: E731
        checkpoint = CheckpointOptions(every_n_steps=None, **options)
        resilience = ResilienceOptions(agree_every_s=1.0)
        self.boundary = Boundary(
            save, checkpoint, resilience, self.stop_request, lambda: self.failed, None, None, group
        )
        self.boundary.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.clock.now += self.step_s
            self.trainer.global_step += 1
            if self.trainer.global_step >= self.boundary.next_step:
                self.boundary.on_step(self.trainer, None, self.trainer.global_step)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(boundary, "time", made)
    monkeypatch.setattr(boundary, "validation_follows", lambda trainer: False)
    return made


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """Of one rank, which agrees with itself as several do."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("step_s", "later"), [(0.02, 1), (0.5, 0)])
def test_a_request_is_acted_on_at_the_agreement_or_a_short_step_later(
    tmp_path: Path, clock: Clock, group: Any, step_s: float, later: int
) -> None:
    job = Job(tmp_path, clock, group, step_s)
    job.steps(200)
    every = max(1, round(1.0 / step_s))
    assert (every >= SHORT_STEPS) == bool(later)
    job.stop_request.touch()
    asked_at = next(step for step in range(201, 400) if step >= job.boundary._next_agreement)
    with pytest.raises(StopTraining):
        job.steps(2 * every + 2)
    assert job.trainer.global_step == asked_at + later
    assert job.saved == [job.trainer.global_step]


def test_one_rank_has_nobody_to_wait_for(tmp_path: Path, clock: Clock) -> None:
    job = Job(tmp_path, clock, None, 0.02)
    job.steps(200)
    asked_at = job.boundary._next_agreement
    job.stop_request.touch()
    with pytest.raises(StopTraining):
        job.steps(100)
    assert job.trainer.global_step == asked_at


def test_it_is_agreed_about_once_a_second(tmp_path: Path, clock: Clock, group: Any) -> None:
    job = Job(tmp_path, clock, group, 0.02)
    asked = []
    ask = job.boundary._ask
    job.boundary._ask = lambda step: (asked.append(step), ask(step))[1]  # type: ignore[method-assign,func-returns-value]
    job.steps(1000)
    assert 15 <= len(asked) <= 40
    assert asked[-1] - asked[-2] == 50


def test_minutes_between_saves_are_kept(tmp_path: Path, clock: Clock, group: Any) -> None:
    job = Job(tmp_path, clock, group, 0.02, every_minutes=0.1)
    job.steps(1200)
    assert len(job.saved) == 3
    assert all(5 * 50 < later - before < 8 * 50 for before, later in zip(job.saved, job.saved[1:], strict=False))


def test_a_failed_save_that_was_agreed_on_last_is_not_lost(tmp_path: Path, clock: Clock, group: Any) -> None:
    job = Job(tmp_path, clock, group, 0.02)
    job.steps(200)
    job.failed = True
    while job.boundary._under_way is None:
        job.steps(1)
    with pytest.raises(StopTraining) as raised:
        job.boundary.on_train_end(job.trainer, None)  # type: ignore[arg-type]
    assert raised.value.request is Request.SAVE_FAILED
