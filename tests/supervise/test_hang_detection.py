"""The watch on a clock of its own, and whom it blames."""

from __future__ import annotations

from pathlib import Path

from trainer.runs.directory import RunDirectory
from trainer.supervise.hang_detection import Allowances, Hang, HangDetector, Place, blame, uneven

ALLOWANCES = Allowances(factor=10, floor_s=20, slow_s=100)
DUMP = """Thread 0x00007f71d3fff6c0 (most recent call first):
  File "/lib/threading.py", line 1 in wait

Current thread 0x00007f71d97d4b80 (most recent call first):
  File "{innermost}", line 9 in here
  File "/lib/lightning/loops.py", line 2 in advance
"""
WAITING = "/lib/torch/autograd/graph.py"


def place(rank: int, step: int, phase: str = "train", progress: int = 0) -> Place:
    return Place(rank, f"host{rank}", 100 + rank, step, phase, progress)


def both(step: int, phase: str = "train", progress: int = 0) -> list[Place]:
    return [place(0, step, phase, progress), place(1, step, phase, progress)]


def hangs_after(watch: HangDetector, places: list[Place], begin_s: float) -> float:
    """Seconds from `begin_s` on until the watch, asked each second, speaks up."""
    for second in range(10_000):
        if watch.check(places, begin_s + second):
            return second
    raise AssertionError("it never spoke up")


def trained(seconds_a_step: float, steps: int) -> HangDetector:
    watch = HangDetector(ALLOWANCES, 0.0)
    for step in range(steps + 1):
        assert watch.check(both(step), step * seconds_a_step) is None
    return watch


def test_long_steps_are_measured_by_their_median() -> None:
    assert hangs_after(trained(5.0, 9), both(9), 45.0) == 51  # more than 10 x 5 s


def test_short_steps_have_the_floor() -> None:
    assert hangs_after(trained(0.1, 50), both(50), 5.0) == 21


def test_the_first_step_start_up_and_validation_have_the_long_allowance() -> None:
    assert hangs_after(HangDetector(ALLOWANCES, 0.0), [], 0.0) == 101
    watch = HangDetector(ALLOWANCES, 0.0)
    watch.check(both(40), 0.0)  # resumed at 40
    assert hangs_after(watch, both(40), 0.0) == 101
    watch = trained(1.0, 9)
    watch.check(both(9, "validate"), 10.0)
    assert hangs_after(watch, both(9, "validate"), 10.0) == 101


def test_a_validation_that_makes_progress_is_no_hang() -> None:
    watch = trained(1.0, 9)
    for batch in range(50):
        assert watch.check(both(9, "validate", progress=batch), 10.0 + 90.0 * batch) is None


def hang(*places: Place) -> Hang:
    return Hang(list(places), 30.0, 20.0)


def dump(folder: Path, *innermost: str | None) -> RunDirectory:
    run = RunDirectory(folder)
    run.attempt_logs(0).mkdir(parents=True)
    for rank, frame in enumerate(innermost):
        text = DUMP.format(innermost=frame) if frame else ""
        run.stacks(0, rank).write_text(text)
    return run


def test_the_rank_of_the_lowest_step_is_behind(tmp_path: Path) -> None:
    run = dump(tmp_path, WAITING, WAITING)
    found = blame(hang(place(0, 12), place(1, 11)), run, 0)
    assert found.place == place(1, 11)
    assert found.where == f'File "{WAITING}", line 9 in here'


def test_the_rank_that_alone_has_not_come_to_a_collective_is_behind(tmp_path: Path) -> None:
    run = dump(tmp_path, WAITING, WAITING)
    assert blame(hang(*both(12)), run, 0, [1]).place == place(1, 12)
    assert blame(hang(*both(12)), run, 0, [0, 1]).place is None


def test_of_equal_steps_the_one_that_does_not_wait_for_others(tmp_path: Path) -> None:
    run = dump(tmp_path, "/home/me/model.py", WAITING)
    found = blame(hang(*both(12)), run, 0)
    assert found.place == place(0, 12)
    assert found.where == 'File "/home/me/model.py", line 9 in here'


def test_a_rank_that_does_not_answer_is_behind(tmp_path: Path) -> None:
    run = dump(tmp_path, WAITING, None)
    found = blame(hang(*both(12)), run, 0)
    assert found.place == place(1, 12)
    assert "no response to SIGUSR2" in found.where


def test_a_rank_whose_node_has_not_asked_for_its_stacks_yet_is_not_called_silent(tmp_path: Path) -> None:
    run = dump(tmp_path, WAITING, None)
    found = blame(hang(*both(12)), run, 0, [0], answered=[0, 1])
    assert found.place == place(0, 12)


def test_nobody_is_named_where_all_wait(tmp_path: Path) -> None:
    run = dump(tmp_path, WAITING, WAITING)
    found = blame(hang(*both(12)), run, 0)
    assert found.place is None
    assert "all ranks are in" in found.where


def test_ranks_with_different_numbers_of_batches_are_named() -> None:
    told = uneven([place(0, 5), place(1, 5, "validate"), place(2, 5)])
    assert told is not None
    assert told.startswith("rank 1 had no batches left while ranks 0, 2 trained")
    assert uneven(both(5)) is None
    assert uneven(both(5, "validate")) is None
