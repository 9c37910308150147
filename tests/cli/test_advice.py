"""What `trainer why` advises: a command to copy for each kind of failure, and none where it would mislead."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.cli.advice import advice, stalled
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Phase

FAILED = AttemptOutcome(attempt=0, outcome="failed")
UNEVEN = (
    "the ranks are at different positions: rank 0 at step 12 (train), rank 1 at step 10 (validate). If a data loader "
    "of yours gives them unequal numbers of batches, set trainer.limit_train_batches to the smallest number, or yield "
    "the same number on each rank"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path))
    made = RunDirectory(tmp_path / "job-abcdefgh")
    made.live_dir.mkdir(parents=True)
    made.config_path.write_text("{}")
    return made


def ranks(run: RunDirectory, *places: tuple[int, Phase], moved_s: float = 0.0) -> None:
    for rank, (step, phase) in enumerate(places):
        run.write_heartbeat(rank, HeartbeatRecord(step=step, phase=phase, moved=time.time() - moved_s))


@pytest.mark.parametrize(
    ("reason", "overrides"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", ["resilience.on_oom=halve"]),
        ("OSError: [Errno 28] No space left on device", ["checkpoint.keep_last=1"]),
        ("OSError: [Errno 122] Disk quota exceeded", ["checkpoint.keep_last=1"]),
        ("3 attempts in a row saved no newer checkpoint", ["checkpoint.every_minutes=5"]),
        ("the loss is NaN at step 3", ["resilience.on_nonfinite=skip"]),
        ("the gradients of step 3 are not finite", ["resilience.on_nonfinite=skip"]),
        ("loss spike at step 3: 9.1", ["resilience.on_spike=skip"]),
        ("no progress for 181 s (limit 180 s)", ["resilience.hang_after_s=600"]),
        ("rank 1 did not move for 181 s, 180 s are allowed", ["resilience.hang_after_s=600"]),  # of an earlier release
        ("its workers ended without an error message", []),
    ],
)
def test_each_remedy_is_a_whole_command(run: RunDirectory, reason: str, overrides: list[str]) -> None:
    said = advice(run, reason, FAILED)
    assert [one.partition(": trainer resume ")[2] for one in said] == [f"abcdefgh {one}" for one in overrides]


def test_what_a_resume_cannot_cure_is_launched_anew(run: RunDirectory) -> None:
    run.overrides_path.write_text("model=mlp\n")
    said = advice(run, "KeyError: the loss is NaN", replace(FAILED, mend=True))
    assert len(said) == 1
    assert said[0].startswith("resuming would fail the same way; fix the cause, then run: trainer fit ")


def test_a_lost_node_is_nobodys_mistake(run: RunDirectory) -> None:
    ranks(run, (12, "train"), (10, "validate"))
    for reason in ("node3 was lost (down)", "no progress for 9 s: lost node node3"):
        assert advice(run, reason, None) == ["not caused by your code: the requeued job resumes without the lost node"]


def test_ranks_at_different_positions_come_first(run: RunDirectory) -> None:
    ranks(run, (12, "train"), (10, "validate"))
    first, second = advice(run, "no progress for 181 s (limit 180 s)", FAILED)
    assert first == UNEVEN
    assert second.endswith("trainer resume abcdefgh resilience.hang_after_s=600")
    assert advice(run, "rank 0: connection closed by peer", FAILED) == [UNEVEN]
    assert advice(run, "KeyError: 3", FAILED) == []
    ranks(run, (12, "train"), (12, "train"))
    assert len(advice(run, "no progress for 181 s (limit 180 s)", FAILED)) == 1


def test_a_running_job_is_stalled_after_a_minute(run: RunDirectory) -> None:
    ranks(run, (12, "train"), (10, "validate"), moved_s=50.0)
    assert stalled(run) is None
    ranks(run, (12, "train"), (10, "validate"), moved_s=70.0)
    assert stalled(run) == UNEVEN
    ranks(run, (12, "train"), (12, "train"), moved_s=70.0)
    assert stalled(run) is None
