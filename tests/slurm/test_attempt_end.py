"""What `slurm.attempt end` records and decides, with the answers of SLURM given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.core.errors import DONE, JOB_FAILED, NEVER_RESTART, REQUEUE
from trainer.runs.cause import Cause
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome
from trainer.slurm import attempt, ending

RUNNING, GONE = {"JobState": "RUNNING"}, {"JobState": "COMPLETING", "Restarts": "1"}
FAILED = AttemptOutcome(attempt=1, outcome="failed", reason="ValueError: no", step=7)
SAVED = AttemptOutcome(attempt=1, outcome="requeue", step=7)


@dataclass(frozen=True)
class Case:
    """How an attempt ended, and what becomes of it."""

    code: int
    """What the script returns; 75: it begins another attempt."""
    outcome: str
    reason: str
    events: str
    job: dict[str, str]
    record: AttemptOutcome | None = None
    """What a rank or the node process has recorded."""
    slurm: str | None = None
    """Why SLURM ended it."""
    lost: str = ""
    """A node that was lost."""
    stops: bool = False
    max_restarts: int = 3
    nodes: int = 2
    restarted: bool = False


CASES = {
    "stopped": Case(DONE, "stopped", "stop requested", "", RUNNING, SAVED, stops=True),
    "saved near its limit": Case(DONE, "requeue", "saved: its time limit was near", "requeued", RUNNING, SAVED),
    "saved and preempted": Case(JOB_FAILED, "requeue", "saved: preempted", "requeued", GONE, SAVED),
    "not saved": Case(
        JOB_FAILED, "requeue", "not saved: a node failed", "preempted requeued", GONE, slurm="a node failed"
    ),
    "too long": Case(
        DONE, "requeue", f"not saved: {ending.TIME_LIMIT}", "preempted requeued", GONE, slurm=ending.TIME_LIMIT
    ),
    "a node is gone": Case(
        DONE, "requeue", "not saved: n1 was lost (DOWN)", "node_lost preempted requeued", RUNNING, lost="n1"
    ),
    "a rank died": Case(REQUEUE, "failed", "KeyError: 'x'", "", RUNNING, restarted=True),
    "a rank died for the last time": Case(JOB_FAILED, "failed", "KeyError: 'x'", "failed", RUNNING, max_restarts=0),
    "the only node gave up": Case(JOB_FAILED, "failed", "ValueError: no", "failed", RUNNING, FAILED, nodes=1),
    "it would fail again": Case(
        NEVER_RESTART,
        "failed",
        "no",
        "",
        RUNNING,
        AttemptOutcome(attempt=1, outcome="failed", exit_code=NEVER_RESTART, reason="no", step=7),
    ),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    run = RunDirectory(tmp_path / "run-abcdefgh")
    for folder in (run.attempts_dir, run.attempt_logs(1), run.checkpoints_dir, run.stop_request.parent):
        folder.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-1]")
    monkeypatch.setenv("TRAINER_ATTEMPT", "1")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return run


@pytest.mark.parametrize("name", CASES)
def test_an_end_is_recorded_once_with_its_reason(name: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    run.config_path.write_text(yaml.safe_dump({"resilience": {"max_restarts": case.max_restarts}}))
    monkeypatch.setenv(attempt.NODES_VARIABLE, str(case.nodes))
    if case.record is not None:
        run.write_outcome(case.record)
    if case.stops:
        run.stop_request.write_text("the user\n")
    cause = Cause(
        "KeyError: 'x'", ["KeyError: 'x'"], run.attempt_logs(1) / "rank-1.log", 1, rank=1, host="n1", mend=True
    )
    answers: dict[tuple[Any, str], Any] = {
        (attempt.query, "job"): lambda job_id: case.job,
        (attempt.query, "hostnames"): lambda names: ["n0", "n1"],
        (attempt.lost_nodes, "find"): lambda nodes: {case.lost: "DOWN"} if case.lost else {},
        (attempt.lost_nodes, "exclude"): lambda run, job_id: None,
        (attempt.ending, "by_slurm"): lambda run, job_id, number: case.slurm,
        (attempt.cause, "find"): lambda run, number, log: cause,
        (attempt, "call"): lambda *arguments: "",
    }
    for (module, function), answer in answers.items():
        monkeypatch.setattr(module, function, answer)

    assert attempt.end(run, 1) == case.code

    (end,) = run.attempts()
    assert (end.attempt, end.outcome, end.reason, end.restarted) == (1, case.outcome, case.reason, case.restarted)
    assert end.step == (7 if case.record and not case.stops else None)  # the last heartbeat's, of which there is none
    died = name.startswith("a rank died")
    assert (end.rank, end.host, end.log, end.mend) == (
        (1, "n1", "logs/attempt-01/rank-1.log", True) if died else (None, None, None, False)
    )
    assert " ".join(event.event for event in run.events()) == case.events
