"""When the ranks agree, and when they act on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from tests.callbacks import boundary_job
from tests.callbacks.boundary_job import Clock, Job
from tests.distributed.ranks import run_ranks
from trainer.callbacks import boundary
from trainer.callbacks.boundary import SHORT_STEPS
from trainer.runtime.stop import Request, StopTraining


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
    start = job.boundary._start_agreement
    job.boundary._start_agreement = lambda step: (asked.append(step), start(step))[1]  # type: ignore[method-assign,func-returns-value]
    job.steps(1000)
    assert 15 <= len(asked) <= 40
    assert asked[-1] - asked[-2] == 50


def test_minutes_between_saves_are_kept(tmp_path: Path, clock: Clock, group: Any) -> None:
    job = Job(tmp_path, clock, group, 0.02, every_minutes=0.1)
    job.steps(1200)
    assert len(job.saved) == 3
    assert all(5 * 50 < later - before < 8 * 50 for before, later in pairwise(job.saved))


@pytest.mark.parametrize("skew_s", [0.0, 0.3])
def test_two_ranks_act_at_the_same_step_whatever_falls_together(tmp_path: Path, skew_s: float) -> None:
    """Saves by steps and by minutes, validations, and a stop that only one of them sees; the second rank's clock runs
    ahead, and its steps take longer."""
    run_ranks(2, Path(boundary_job.__file__), [str(tmp_path), str(skew_s)], tmp_path, timeout_s=240)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    saved, stopped = seen[0]
    assert stopped is not None
    assert len(saved) > 2
    assert all(later - before > 1 for before, later in pairwise(saved)), saved


def test_a_failed_save_that_was_agreed_on_last_is_not_lost(tmp_path: Path, clock: Clock, group: Any) -> None:
    job = Job(tmp_path, clock, group, 0.02)
    job.steps(200)
    job.saver.failed = True
    while job.boundary._pending is None:
        job.steps(1)
    with pytest.raises(StopTraining) as raised:
        job.boundary.on_train_end(job.trainer, None)  # type: ignore[arg-type]
    assert raised.value.request is Request.SAVE_FAILED


def test_a_signal_that_comes_just_after_its_request_was_looked_for_waits_for_the_next_look(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is written before the signal is sent: taken for a preemption, a stopped run would be requeued."""

    class Absent:
        def exists(self) -> bool:
            monkeypatch.setattr(boundary.stop, "signalled", lambda: True)
            return False

    job = Job(tmp_path, clock, None, 0.02)
    job.steps(2)
    monkeypatch.setattr(job.boundary, "_stop_request", Absent())
    assert job.boundary._own_request(0.0) is Request.NOTHING
