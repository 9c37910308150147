"""The process of a command: closed streams, a locale without UTF-8, a user without a home directory."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import NoReturn

import pytest

from trainer import __version__
from trainer.cli import ls, main
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, USER_MUST_CHANGE
from trainer.core.processes import python_module


def in_locale(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run `trainer` where the encoding of the locale is ASCII, which stands for any but UTF-8."""
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(
        python_module("trainer", *arguments),
        cwd=cwd,
        env={**os.environ, **ascii_only, **variables},
        capture_output=True,
        timeout=300,
        check=False,
    )


def test_a_name_that_the_locale_cannot_encode_is_printed_and_read(tmp_path: Path) -> None:
    folder = tmp_path / "läufe"
    done = in_locale("ls", "--runs-dir", str(folder))
    assert done.returncode == DONE, done.stderr.decode()
    assert f"no runs in {folder}".encode() in done.stdout + done.stderr


def test_beginning_again_in_utf8_runs_no_file_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("print('taken')")
    done = in_locale("--version", cwd=tmp_path)
    assert done.stdout.decode().split() == ["trainer", __version__], done.stderr.decode()


def test_a_stream_with_another_encoding_gets_what_it_can_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    raw = BytesIO()
    stream = TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["ls", "--runs-dir", str(tmp_path / "läufe")]) == DONE
    stream.flush()
    assert b"l\\xe4ufe" in raw.getvalue()


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_is_one_to_nowhere(closed: int, tmp_path: Path) -> None:
    """Without it, the first file that is opened would have the number of the stream, and get what is printed."""
    program = (
        "import os, sys; from trainer.cli import main; code = main(['ls', '--runs-dir', sys.argv[1]]); "
        "print('own'); print('own', file=sys.stderr); "
        "os._exit(code if os.path.samefile(f'/proc/self/fd/{sys.argv[2]}', os.devnull) else 9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(closed)]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], capture_output=True, timeout=300)
    assert done.returncode == DONE
    other = done.stderr if closed == 1 else done.stdout
    assert b"Error" not in other
    assert other.endswith(b"own\n")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("verb", ["fit", "check", "plan", "env", "doctor", "evaluate"])
def test_a_job_of_a_user_without_a_home_is_refused_before_it_starts(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B's client and others end in a rank otherwise."""
    assert main([verb]) == ENVIRONMENT_MUST_CHANGE
    assert "set HOME to a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("homeless")
def test_runs_are_listed_without_a_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--runs-dir", str(tmp_path)]) == DONE
    assert main(["ls", "--runs-dir", "~/runs"]) == USER_MUST_CHANGE
    assert capsys.readouterr().err.endswith("set HOME, and write paths that begin with ~ in full\n")


def test_a_working_directory_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.delenv("TRAINER_RUNS_DIR", raising=False)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["ls"]) == USER_MUST_CHANGE
    assert capsys.readouterr().err.startswith("trainer: the working directory has been deleted\n")


def test_a_path_of_an_unknown_user_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr(ls, "main", lambda argv: Path("~nobody-of-this-name/runs").expanduser())
    assert main(["ls"]) == USER_MUST_CHANGE
    assert "unexpected" not in capsys.readouterr().err
