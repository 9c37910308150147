"""From the log files of a run directory to the lines that `trainer why` prints: every cause and every state."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_directory import make
from tests.runs.test_state import ended, launched
from trainer.cli import main
from trainer.cli import why as why_verb
from trainer.core.errors import DONE, EnvironmentFault
from trainer.runs import cause
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Started
from trainer.runs.records import HeartbeatRecord, Phase

GONE = 2**30
"""A process id that Linux does not use."""
ENDED = 1e9
WHEN = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ENDED))
TRACEBACK = """loading data
Traceback (most recent call last):
  File "/code/mine.py", line 3, in forward
    {line}
{error}
"""
PEER_GONE = "torch.distributed.DistBackendError: [gloo] Connection closed by peer [10.0.0.7]:4711"
TORCHRUN = "E0102 03:04:0{second}.000 1 api.py:984] failed (exitcode: {code}) local_rank: 1 (pid: {pid}) of"


def failure(reason: str, rank: int, **fields: Any) -> str:
    """The content of `rank-R.failure.json`, which a rank writes that an exception ends."""
    values = {"reason": reason, "where": None, "step": 7, "rank": rank, "time": 1.0, "is_final": False, "mend": False}
    return json.dumps({**values, **fields})


@dataclass(frozen=True)
class Case:
    """The log files of an attempt, and patterns of the lines that follow the name of the run."""

    logs: dict[str, str]
    reason: str
    advice: tuple[str, ...] = ()
    place: str = ""
    details: tuple[str, ...] = ()
    heartbeats: dict[int, dict[str, Any]] = field(default_factory=dict)


CASES = {
    "an exception that the rank recorded": Case(
        logs={
            "rank-0.log": "step 7\n",
            "rank-1.log": TRACEBACK.format(line="batch['image']", error="KeyError: 'image'"),
            "rank-1.failure.json": failure("KeyError: 'image'", 1, where="mine.py:3 in forward"),
        },
        heartbeats={1: {"host": "node7"}},
        reason="KeyError: 'image'",
        place=" on node7",
        details=("in mine.py:3 in forward", "in logs/attempt-00/rank-1.log"),
    ),
    "an exception that would come again": Case(
        logs={"rank-0.failure.json": failure("ValueError: bad shape", 0, where="mine.py:3", mend=True)},
        reason="ValueError: bad shape",
        advice=(r"resuming would fail the same way; fix the cause, then run: .*trainer fit .*",),
        details=("in mine.py:3", "in logs/attempt-00/rank-0.log"),
    ),
    "an exception that is only in the log": Case(
        logs={"rank-2.log": TRACEBACK.format(line="x[9]", error="IndexError: out of range")},
        heartbeats={2: {"host": "node2"}},
        reason="IndexError: out of range",
        place=" on node2",
        details=("in logs/attempt-00/rank-2.log",),
    ),
    "the root cause, not the ranks that lost their peer": Case(
        logs={
            "rank-0.log": TRACEBACK.format(line="loss.backward()", error=PEER_GONE),
            "rank-0.failure.json": failure(PEER_GONE, 0, time=1.0),
            "rank-1.log": TRACEBACK.format(line="1 / 0", error="ZeroDivisionError: division by zero"),
            "rank-1.failure.json": failure("ZeroDivisionError: division by zero", 1, time=2.0),
        },
        reason="ZeroDivisionError: division by zero",
        details=("in logs/attempt-00/rank-1.log",),
    ),
    "a peer that is gone, if no rank has a better reason": Case(
        logs={"rank-0.log": TRACEBACK.format(line="loss.backward()", error=PEER_GONE)},
        reason=re.escape(PEER_GONE),
        details=("in logs/attempt-00/rank-0.log",),
    ),
    "a record with a wrong type, and half a record, are skipped": Case(
        logs={
            "rank-0.log": TRACEBACK.format(line="1 / 0", error="ZeroDivisionError: division by zero"),
            "rank-0.failure.json": failure("another", 0, step="seven"),
            "rank-1.failure.json": "{",
        },
        reason="ZeroDivisionError: division by zero",
        details=("in logs/attempt-00/rank-0.log",),
    ),
    "a signal": Case(
        logs={"rank-5.log": "step 7\n", "node-0.log": TORCHRUN.format(second=5, code=-11, pid=4242)},
        heartbeats={4: {"pid": 4241, "host": "node0"}, 5: {"pid": 4242, "host": "node0"}},
        reason="rank 5 was killed by SIGSEGV",
        place=" on node0",
        details=(r"\| step 7", "in logs/attempt-00/rank-5.log"),
    ),
    "SIGKILL, for which memory is the usual reason": Case(
        logs={"rank-1.log": "step 7\n", "node-0.log": TORCHRUN.format(second=5, code=-9, pid=4242)},
        reason=r"rank 1 was killed by SIGKILL \(.*out of memory\)",
        advice=(r"use a smaller micro-batch; .*: trainer resume \S+ resilience\.on_oom=halve",),
        details=(r"\| step 7", "in logs/attempt-00/rank-1.log"),
    ),
    "an exit code": Case(
        logs={"rank-1.log": "giving up\n", "node-0.log": TORCHRUN.format(second=5, code=3, pid=4242)},
        reason="rank 1 exited with code 3",
        details=(r"\| giving up", "in logs/attempt-00/rank-1.log"),
    ),
    "the node whose rank failed first": Case(
        logs={
            "node-0.log": f"attempt 0: 2 nodes on node0\n{TORCHRUN.format(second=9, code=-15, pid=1)}",
            "node-1.log": f"attempt 0: 2 nodes on node1\n{TORCHRUN.format(second=2, code=-11, pid=2)}",
        },
        heartbeats={0: {"pid": 1, "host": "node0"}, 3: {"pid": 2, "host": "node1"}},
        reason="rank 3 was killed by SIGSEGV",
        place=" on node1",
    ),
    "torchrun was killed": Case(
        logs={"rank-0.log": "step 7\n", "node-0.log": "torchrun on node7 was killed by SIGKILL\n"},
        reason="torchrun on node7 was killed by SIGKILL.*",
        place=" on node7",
        details=("in logs/attempt-00/node-0.log",),
    ),
    "ranks that left only output": Case(
        logs={"rank-0.log": "step 7\nlibfoo: fatal\n\n"},
        reason="its workers ended without .*: libfoo: fatal",
        details=("in logs/attempt-00/rank-0.log",),
    ),
    "ranks that left nothing": Case(logs={}, reason="its workers ended without .*"),
    "a failed import, before a rank has a log": Case(
        logs={"node-0.log": f"{TRACEBACK.format(line='import foo', error='ImportError: no foo')}"},
        reason="ImportError: no foo",
        details=("in logs/attempt-00/node-0.log",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_in_the_logs_is_printed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, run = CASES[name], make(tmp_path)
    launched(run, GONE)
    logs = run.attempt_logs(0)
    logs.mkdir(parents=True)
    for file, text in case.logs.items():
        (logs / file).write_text(text)
    for rank, beat in case.heartbeats.items():
        run.write_heartbeat(rank, HeartbeatRecord(phase="train", **beat))
    died = cause.find(run, 0, run.node_log(0, 0))
    log = str(died.log.relative_to(run.path)) if died.log else None
    record = {name: getattr(died, name) for name in ("reason", "lines", "rank", "host", "where", "mend")}
    ended(run, 0, "failed", **record, log=log, exit_code=1, step=7, time=ENDED)

    assert main(["why", str(run.path)]) == DONE
    printed = capsys.readouterr().out.splitlines()
    expected = [
        f"{run.path.name} is failed: {case.reason}",
        *(f"  {sentence}" for sentence in case.advice),
        f"  attempt 0, step 7, {WHEN}{case.place}: {case.reason}",
        *(f"    {line}" for line in case.details),
    ]
    assert len(printed) == len(expected), printed
    for line, pattern in zip(printed, expected, strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"


FULL_DISKS = (
    "Checkpoint step-00000007 could not be written: rank 0: OSError: [Errno 28] No space left on device; "
    "rank 1: OSError: [Errno 122] Disk quota exceeded"
)
ADVICE = {
    "CUDA out of memory. Tried to allocate 2.00 GiB": "resilience.on_oom=halve",
    "OSError: [Errno 28] No space left on device": "checkpoint.keep_last=1",
    "OSError: [Errno 122] Disk quota exceeded": "checkpoint.keep_last=1",
    "Not enough space for a checkpoint in runs/x: needs 2.0 GB, 1.0 MB free.": "checkpoint.keep_last=1",
    "No free inodes in runs/x.": "checkpoint.keep_last=1",
    FULL_DISKS: "checkpoint.keep_last=1",
    "3 attempts in a row left no newer checkpoint; the last ended with: x": "checkpoint.every_minutes=5",
    "the loss is NaN at step 7": "resilience.on_nonfinite=skip",
    "the gradient norm is infinite at step 7": "resilience.on_nonfinite=skip",
    "loss spike at step 7: 3.1 after 0.2": "resilience.on_spike=skip",
    "no progress for 181 s (limit 180 s): rank 1 on node7": "resilience.hang_after_s=600",
    "rank 1 on node7 (step 3, train) did not move for 181 s, 180 s are allowed": "resilience.hang_after_s=600",
}
"""Reasons, in the words of this and of earlier versions, and the override that helps."""


@pytest.mark.parametrize("reason", ADVICE)
def test_a_known_reason_comes_with_a_command(reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    launched(run, GONE)
    ended(run, 0, "failed", reason=reason, exit_code=1, step=7, time=ENDED)
    assert main(["why", str(run.path), "--json"]) == DONE
    said, advice = json.loads(capsys.readouterr().out)["why"]
    assert said == reason
    assert re.search(rf": trainer resume \S+ {re.escape(ADVICE[reason])}$", advice), advice


def test_a_lost_node_needs_no_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    launched(run, GONE)
    ended(run, 0, "requeue", reason="not saved: node7 was lost", exit_code=75, step=7, time=ENDED)
    assert main(["why", str(run.path)]) == DONE
    assert "not caused by your code: the requeued job resumes without the lost node" in capsys.readouterr().out


def states(run: RunDirectory, name: str) -> None:
    """Bring a run into a state."""
    if name != "never launched":
        launched(run, GONE if name in ("dead", "finished", "stopped") else os.getpid())
    if name in ("running", "stopping"):
        run.add_event(Started(attempt=0, step=0))
    if name == "stopping":
        run.stop_request.write_text("trainer stop")
    if name in ("finished", "stopped"):
        ended(run, 0, name, reason="", exit_code=0, step=10, time=ENDED)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("never launched", r"is dead: it was never launched"),
        ("starting", "is starting"),
        ("running", "is running"),
        ("stopping", "is stopping: .*save.*"),
        ("dead", "is dead: .*processes.* gone.*"),
        ("finished", "is finished"),
        ("stopped", "is stopped"),
    ],
)
def test_a_run_without_a_failure_is_one_line(
    name: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    states(run, name)
    assert main(["why", str(run.path)]) == DONE
    (printed,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{re.escape(run.path.name)} {line}", printed)


def test_ranks_that_wait_for_each_other_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    states(run, "running")
    phases: tuple[Phase, ...] = ("train", "validate")
    for rank, phase in enumerate(phases):
        run.write_heartbeat(rank, HeartbeatRecord(step=6, phase=phase, moved=time.time() - 61))
    assert main(["why", str(run.path)]) == DONE
    (line,) = capsys.readouterr().out.splitlines()
    assert "the ranks are at different positions: rank 0 at step 6 (train), rank 1 at step 6 (validate)." in line


def test_an_earlier_failure_of_a_finished_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    launched(run, GONE)
    ended(run, 0, "failed", reason="OSError: disk", restarted=True, exit_code=1, step=None, time=ENDED)
    ended(run, 1, "finished", reason="", exit_code=0, step=10, time=ENDED)
    assert main(["why", str(run.path)]) == DONE
    first, attempt = capsys.readouterr().out.splitlines()
    assert first == f"{run.path.name} is finished"
    assert attempt == f"  attempt 0, before the first step, {WHEN}: OSError: disk"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (["other jobs have priority", "it starts at about 12:00"], "is queued: other jobs have priority"),
        ([], "is queued: pending"),
        (EnvironmentFault("SLURM does not answer"), "is queued: SLURM does not answer"),
    ],
)
def test_a_queued_run_asks_slurm(
    answer: list[str] | EnvironmentFault,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def explain(run: RunDirectory) -> list[str]:
        if isinstance(answer, EnvironmentFault):
            raise answer
        return answer

    run = make(tmp_path)
    launched(run, GONE, cluster="slurm", slurm_job_id="7")
    monkeypatch.setattr(why_verb, "states_of", lambda runs: {"7": "PENDING"})
    monkeypatch.setattr(why_verb, "why_it_waits", explain)
    assert main(["why", str(run.path)]) == DONE
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{run.path.name} {line}"
    assert rest == [f"  {sentence}" for sentence in (answer if isinstance(answer, list) else [])[1:]]
