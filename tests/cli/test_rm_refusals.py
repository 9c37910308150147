"""`trainer rm` deletes runs that were named, and nothing where one of them may not be deleted."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import NoReturn

import pytest

from tests.dashboard.fake_runs import make_run
from tests.runs.test_state import launched
from trainer.cli import main, rm
from trainer.core.errors import DONE, USER_MUST_CHANGE
from trainer.runs.directory import RunDirectory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunDirectory]:
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path))
    found = [make_run(tmp_path, name, steps=20, ago_s=ago_s) for name, ago_s in (("old", 2000.0), ("new", 1000.0))]
    for run in found:
        run.manifest_path.write_text(json.dumps({"schema_version": 1}))
    return found


def left(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "an empty text names no run"),  # trainer rm "$RUN"
        (["new", ""], "an empty text names no run"),
        (["new", "newest"], "there is no run newest in"),
        (["new", "."], "is not a run directory"),
    ],
)
def test_nothing_is_deleted_unless_all_are_runs(
    runs: list[RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["./" if one == "." else one for one in arguments]
    assert main(["rm", *arguments, "--yes"]) == USER_MUST_CHANGE
    assert said in capsys.readouterr().err
    assert left(tmp_path) == ["new", "old"]


@pytest.mark.parametrize(
    ("answer", "code", "names"),
    [("y\n", DONE, ["new"]), ("n\n", USER_MUST_CHANGE, ["new", "old"]), ("\n", USER_MUST_CHANGE, ["new", "old"])],
)
def test_it_asks_at_a_terminal(
    runs: list[RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, names: list[str]
) -> None:
    stdin = io.StringIO(answer)
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["rm", "old"]) == code
    assert left(tmp_path) == names


def test_what_was_deleted_is_told(runs: list[RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "old", runs[0].id, "--yes", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out) == {"deleted": [runs[0].path.name]}
    assert left(tmp_path) == ["new"]


def test_a_run_that_is_resumed_while_it_asks_is_kept(
    runs: list[RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def confirm(names: list[str]) -> bool:
        launched(runs[0], os.getpid())
        return True

    monkeypatch.setattr(rm, "_confirmed", confirm)
    assert main(["rm", "old", "new"]) == USER_MUST_CHANGE
    assert "stop it first" in capsys.readouterr().err
    assert left(tmp_path) == ["new", "old"]


def test_a_disk_that_takes_no_lock_can_be_emptied(
    runs: list[RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: RunDirectory) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rm, "launching", refuse)
    assert main(["rm", "old", "--yes"]) == DONE
    assert left(tmp_path) == ["new"]
