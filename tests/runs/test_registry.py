from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.runs.test_directory import make
from trainer.runs.registry import VARIABLE, find, reference_to, runs_dir_from


@pytest.mark.parametrize(
    ("folder", "variable", "is_id"),
    [
        ("runs", "", True),
        ("elsewhere", "", False),
        ("with a space", "", False),
        (".", "", False),
        ("elsewhere", "elsewhere", True),
        ("runs", "elsewhere", False),
    ],
)
def test_a_reference_is_found_from_here_with_no_option(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, folder: str, variable: str, is_id: bool
) -> None:
    run = make(workdir, runs_dir=folder)
    monkeypatch.setenv(VARIABLE, variable)
    said = reference_to(run)
    assert (said == run.id) is is_id
    (typed,) = shlex.split(said)
    assert find(typed, runs_dir_from(None)).path == run.path


def test_a_reference_from_another_directory_is_the_whole_path(
    workdir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(workdir)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("another"))
    assert reference_to(run) == str(run.path)
