"""One launch of a run at a time: the lock, the fence behind it, and what the second launch is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from trainer.core import records
from trainer.core.errors import EnvironmentFault, UserError
from trainer.runs import lock
from trainer.runs.directory import RunDirectory
from trainer.runs.lock import RunLock, refuse_if_superseded
from trainer.runs.records import LockHolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(lock, "_DYING_S", -1.0)
    monkeypatch.setattr(lock, "_OTHER_HOST_S", -1.0)
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path))
    made = RunDirectory(tmp_path / "job-abcdefgh")
    made.path.mkdir()
    return made


def test_the_second_launch_is_told_who_has_the_run(run: RunDirectory) -> None:
    first = RunLock(run)
    assert not first.is_taken
    first.take(3)
    assert first.is_taken
    path = run.path / "control" / "lock"
    assert records.read(LockHolder, path) == LockHolder(host=socket.gethostname(), pid=os.getpid(), attempt=3)
    with pytest.raises(UserError) as raised:
        RunLock(run).take(4)
    assert str(raised.value) == (
        f"job-abcdefgh is already being trained (process {os.getpid()} on {socket.gethostname()}, attempt 3); "
        "two launches would overwrite checkpoints\n"
        "  follow it: trainer logs -f abcdefgh; stop it: trainer stop abcdefgh"
    )
    path.write_text("{")  # taken, and not written yet
    with pytest.raises(UserError, match=r"\(process \? on \?, attempt \?\)"):
        RunLock(run).take(4)
    assert first._descriptor is not None
    os.close(first._descriptor)  # as the kernel does when the process ends
    RunLock(run).take(4)
    assert records.read(LockHolder, path) == LockHolder(host=socket.gethostname(), pid=os.getpid(), attempt=4)


def test_a_file_system_without_locks_does_not_keep_a_run_from_training(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    RunLock(run).take(0)
    assert not RunLock(run).is_taken


def test_an_attempt_writes_no_more_once_a_later_one_has_begun(run: RunDirectory) -> None:
    run.attempt_logs(1).mkdir(parents=True)
    refuse_if_superseded(run, 1)
    run.attempt_logs(2).mkdir()
    with pytest.raises(EnvironmentFault) as raised:
        refuse_if_superseded(run, 1)
    assert str(raised.value) == (
        "attempt 2 of this run has begun; attempt 1 must no longer write\n"
        "  nothing is lost, the later attempt continues; find out why this one was not ended"
    )
