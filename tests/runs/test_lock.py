"""One launch of a run at a time: the lock, the fence behind it, and what the second launch is told."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from tests.runs.test_directory import make
from tests.runs.test_state import ended, launched
from trainer.cli import main, resume
from trainer.core import records
from trainer.core.errors import DONE, USER_MUST_CHANGE, EnvironmentFault, UserError
from trainer.runs import lock
from trainer.runs.directory import RunDirectory
from trainer.runs.lock import RunLock, launching, refuse_if_superseded
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


def test_one_command_at_a_time_launches_a_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_LAUNCHING_S", -1.0)
    with launching(run):
        with pytest.raises(UserError, match="job-abcdefgh is being launched by another command"), launching(run):
            raise AssertionError("both launch it")
        RunLock(run).take(0)  # the node process, which it starts
    with launching(run):
        pass


def test_the_second_of_two_resumes_sees_what_the_first_has_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits with its look at the state until the process of the first is recorded."""
    made = make(tmp_path)
    ended(made, 0, "stopped", reason="", exit_code=0, step=3, time=1.0)
    launched(made, 2**30)
    refusals: list[int] = []

    class Launcher:
        def launch(self, other: RunDirectory) -> None:
            second = threading.Thread(target=lambda: refusals.append(main(["resume", str(made.path), "--detach"])))
            second.start()
            second.join(0.5)
            assert second.is_alive()
            launched(other, os.getpid(), attempt=1)
            self.second = second

    launcher = Launcher()
    monkeypatch.setattr(resume.launchers, "launcher", lambda *given, **options: launcher)
    monkeypatch.setattr(resume, "changed_config", lambda run, overrides: run.config())
    monkeypatch.setattr(resume, "record_environment", lambda *given: None)
    assert main(["resume", str(made.path), "--detach"]) == DONE
    launcher.second.join(300)
    assert refusals == [USER_MUST_CHANGE]
    assert "is already starting" in capsys.readouterr().err
    assert [event.event for event in made.events()].count("resumed") == 1
