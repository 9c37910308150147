"""A disk that is full, or that refuses: named by every command, also where nothing could be recorded."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.runs.test_directory import make
from tests.runs.test_state import ended, launched
from trainer.cli import ls, main
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, JOB_FAILED, EnvironmentFault
from trainer.launch.follow import Follower
from trainer.runs import cause, directory
from trainer.runtime import failure
from trainer.sweeps.directory import SweepDirectory, find, reference_to, sweeps_dir_of

GONE = 2**30
"""A process id that Linux does not use."""


def refusing(number: int, path: str | None = None) -> Callable[..., NoReturn]:
    def refuse(*given: object, **options: object) -> NoReturn:
        raise OSError(number, os.strerror(number), *([path] if path else []))

    return refuse


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system is full."""
    statvfs = os.statvfs

    def no_block_left(path: Any) -> os.statvfs_result:
        values = list(statvfs(path))
        values[4] = 0  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", no_block_left)


@pytest.mark.parametrize("refused", ["write_atomic", "append_line", "shlex.join"])
def test_a_run_that_cannot_be_created_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    monkeypatch.setattr(f"trainer.runs.directory.{refused}", refusing(errno.ENOSPC))
    with pytest.raises(EnvironmentFault, match=f"in {tmp_path}/runs: No space left on device") as raised:
        make(tmp_path)
    assert raised.value.fix.startswith("free some space, or set runs_dir")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_refusal_names_the_runs_or_the_file_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "append_line", refusing(errno.EACCES, str(tmp_path / "project" / "secret.py")))
    with pytest.raises(EnvironmentFault, match=r"Permission denied: .*secret\.py") as raised:
        make(tmp_path)
    assert "get permission for it" in raised.value.fix
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match=f"in {tmp_path}/file/runs: Not a directory\n") as raised:
        make(tmp_path, runs_dir="file/runs")
    assert raised.value.fix == "set runs_dir to a folder you can write"


def test_an_interrupted_creation_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(directory, "append_line", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.ENOSPC, None, "No space left on device\n  free some space"),
        (errno.EDQUOT, "runs/x", "runs/x: Disk quota exceeded\n  your disk quota is exhausted"),
        (errno.EROFS, "runs/x", "runs/x: Read-only file system\n  it is on a read-only file system"),
        (errno.EACCES, "runs/x", "runs/x: Permission denied\n  get permission for it"),
    ],
)
def test_what_the_file_system_refuses_is_no_bug_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, path: str | None, said: str
) -> None:
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr(ls, "main", refusing(number, path))
    assert main(["ls"]) == ENVIRONMENT_MUST_CHANGE
    printed = capsys.readouterr().err
    assert printed.startswith(f"trainer: {said}")
    assert "unexpected" not in printed


def test_another_error_is_still_a_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ls, "main", lambda argv: {}["x"])
    assert main(["ls"]) == JOB_FAILED
    monkeypatch.setattr(ls, "main", refusing(errno.EIO))
    assert main(["ls"]) == ENVIRONMENT_MUST_CHANGE
    assert capsys.readouterr().err.count("unexpected error; the traceback is in ") == 2


@pytest.mark.usefixtures("full")
def test_a_run_that_a_full_disk_has_ended_without_a_record_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    ended(run, 0, "finished", reason="", exit_code=0, step=10, time=1.0)
    launched(run, GONE, attempt=1)
    run.attempt_logs(0).mkdir()
    assert cause.find(run, 0).reason == f"No space left on the file system of {run.path}; {cause.UNEXPLAINED}"
    run.rank_log(0, 0).write_text(f"{cause.TRACEBACK}\nRuntimeError: Connection closed by peer\n")
    assert cause.find(run, 0).reason.startswith("No space left on the file system of ")

    assert main(["why", str(run.path)]) == DONE
    printed = capsys.readouterr().out
    assert "the disk is full: free some space, or keep fewer checkpoints: trainer resume" in printed

    stream = StringIO()
    Follower(run, stream).conclude()
    assert f"No space left on the file system of {run.path}; its processes were killed" in stream.getvalue()

    run.rank_log(0, 0).write_text(f"{cause.TRACEBACK}\nKeyError: 'x'\n")
    assert cause.find(run, 0).reason == "KeyError: 'x'"


def test_a_run_that_dies_with_room_on_its_disk_is_not_blamed_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    launched(run, GONE)
    assert main(["why", str(run.path)]) == DONE
    assert "space" not in capsys.readouterr().out


def test_a_traceback_that_cannot_be_logged_does_not_hide_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    class Full(StringIO):
        def write(self, text: str) -> int:
            refused.append(text)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    failure.print_traceback(KeyError("x"))
    assert refused  # and it returned


def test_a_sweep_is_named_so_that_its_commands_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("TRAINER_RUNS_DIR", raising=False)
    for runs_dir, is_id in ((Path("runs"), True), (tmp_path / "a b" / "runs", False)):
        sweep = SweepDirectory.new(sweeps_dir_of(runs_dir), "s")
        (sweep.path / "spec.json").write_text("{}")
        name = reference_to(sweep)
        assert (name == sweep.id) == is_id
        assert find(name.strip("'"), sweeps_dir_of(Path("runs"))).path == sweep.path
