"""How the time of an attempt is divided: hangs by the phase they were in, steps that are made again, other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.core.records import dumps
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Created, Hang
from trainer.runs.ledger import AttemptTime, by_rank, ledger
from trainer.runs.records import HeartbeatRecord


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "job-abcdefgh")
    made.live_dir.mkdir(parents=True)
    made.add_event(Created(time=100.0))
    return made


def beat(run: RunDirectory, rank: int = 0, past: int | None = None, **fields: Any) -> None:
    record = HeartbeatRecord(**{"attempt": past or 0, "began": 110.0, "phase": "train", **fields})
    path = run.live.path(rank) if past is None else run.live.past_path(past, rank)
    path.write_text(dumps(record))


def seconds(run: RunDirectory, **options: Any) -> dict[str, float]:
    found = ledger(run, **options)
    assert found is not None
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"])
    return {name: value for name, value in found["seconds"].items() if value}


@pytest.mark.parametrize("phase", ["build", "first_step", "train", "validate", "finished"])
def test_a_hang_is_taken_from_the_phase_in_which_it_was(run: RunDirectory, phase: str) -> None:
    spent = {"build": 30.0, "first_step": 30.0, "train": 60.0, "validate": 40.0, "finished": 20.0}
    beat(run, phase=phase, spent=spent, step=20)
    run.add_event(Hang(time=290.0, attempt=0, still_s=12.0))
    run.add_event(Hang(time=400.0, attempt=1, still_s=99.0))  # of another attempt
    left = {**spent, phase: spent[phase] - 12.0}
    finish = left.pop("finished")
    assert seconds(run) == pytest.approx({"start": 10.0, **left, "finish": finish, "hang": 12.0})


def test_a_rank_that_failed_in_a_hang_was_training(run: RunDirectory) -> None:
    beat(run, phase="failed", spent={"train": 60.0, "failed": 2.0}, step=20)
    run.add_event(Hang(time=290.0, attempt=0, still_s=12.0))
    assert seconds(run) == {"start": 10.0, "train": 48.0, "hang": 12.0, "finish": 2.0}


def test_a_hang_is_no_longer_than_its_phase(run: RunDirectory) -> None:
    beat(run, phase="first_step", spent={"first_step": 9.0, "train": 1.0})
    run.add_event(Hang(time=130.0, attempt=0, still_s=12.0))  # the clock of the detection began before it
    assert seconds(run) == {"start": 10.0, "hang": 9.0, "train": 1.0}


def test_steps_that_are_made_again_are_counted_from_the_furthest_of_all_attempts(run: RunDirectory) -> None:
    beat(run, past=0, spent={"train": 10.0}, first_step=0, step=100)
    beat(run, past=1, began=120.0, spent={"train": 10.0}, first_step=50, step=60)  # all of them again
    beat(run, past=2, began=130.0, spent={"train": 10.0}, first_step=60, step=60)  # none
    beat(run, attempt=3, began=140.0, spent={"train": 20.0}, first_step=60, step=140)  # 40 of 80 again
    assert seconds(run) == {"start": 10.0, "train": 10.0 + 10.0 + 10.0, "redone": 10.0 + 10.0}


def test_a_hang_among_steps_that_are_made_again_takes_its_share_of_both(run: RunDirectory) -> None:
    beat(run, past=0, spent={"train": 10.0}, first_step=0, step=20)
    beat(run, attempt=1, began=120.0, spent={"train": 40.0}, first_step=10, step=30)
    run.add_event(Hang(time=160.0, attempt=1, still_s=20.0))
    assert seconds(run) == {"start": 10.0, "train": 10.0 + 10.0, "redone": 10.0, "hang": 20.0}


def test_an_active_run_is_accounted_until_now_and_a_clock_behind_changes_nothing(run: RunDirectory) -> None:
    beat(run, spent={"train": 10.0}, step=5)
    assert seconds(run, now=125.0) == {"start": 10.0, "train": 10.0, "down": 5.0}
    assert seconds(run, now=115.0) == {"start": 10.0, "train": 10.0}


def test_without_an_event_the_account_begins_with_the_first_attempt(tmp_path: Path) -> None:
    made = RunDirectory(tmp_path / "job-abcdefgh")
    made.live_dir.mkdir(parents=True)
    beat(made, spent={"import": 2.0, "train": 6.0}, step=5)
    found = ledger(made)
    assert found is not None
    assert (found["wall_s"], found["effective"], found["goodput"]) == (8.0, 0.75, 0.75)
    beat(made, spent={})
    found = ledger(made)
    assert found is not None
    assert (found["wall_s"], found["effective"], found["goodput"]) == (0.0, None, None)
    beat(made, spent=None)  # of a rank that had not begun
    assert ledger(made) is None


def test_the_ranks_of_the_newest_attempt_have_a_row_each(run: RunDirectory) -> None:
    for rank in range(3):
        beat(run, rank, attempt=0 if rank == 2 else 1, host=f"node{rank}", step=7, spent={"train": 3.0 + rank})
    rows = by_rank(run)
    assert [(row["rank"], row["host"], row["step"], row["seconds"]["train"]) for row in rows] == [
        (0, "node0", 7, 3.0),
        (1, "node1", 7, 4.0),
    ]
    beat(run, 1, attempt=1)
    assert by_rank(run)[1]["seconds"] is None


def test_an_amount_by_phase_keeps_its_sum_whatever_the_phases() -> None:
    attempt = AttemptTime(0, 0.0, {}, {"train": {"train": 0.25, "redone": 0.5, "hang": 0.25}})
    amounts = {"train": 8.0, "save": 1.0, "hung": 2.0, "requeue": 3.0, "finish": 4.0}
    assert attempt.by_class(amounts) == {"train": 2.0, "redone": 4.0, "hang": 2.0, "save": 1.0, "finish": 9.0}
