"""An empty text on the command line, as of a variable that is not set, names nothing: not the latest, no default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dashboard.fake_runs import make_run
from trainer.cli import main
from trainer.core.errors import USER_MUST_CHANGE

VERBS = ("show", "why", "logs", "stop", "resume", "repro", "evaluate", "predict", "export", "report", "sync")


@pytest.fixture(autouse=True)
def latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")
    make_run(tmp_path / "runs", "latest", steps=20, ago_s=1000.0)


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_is_not_the_latest(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, ""]) == USER_MUST_CHANGE
    assert capsys.readouterr().err.startswith("trainer: an empty text names no run")


@pytest.mark.parametrize("verb", ["status", "stop", "resume", "best", "export"])
def test_a_sweep_is_not_the_latest(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweeps" / "s-abcdefgh"
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text("{}")
    assert main(["sweep", verb, ""]) == USER_MUST_CHANGE
    assert capsys.readouterr().err.startswith("trainer: an empty text names no sweep")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["ls", "--runs-dir", ""], "--runs-dir"),
        (["rm", "latest", "--yes", "--runs-dir="], "--runs-dir"),
        (["export", "latest", "--out", ""], "--out"),
        (["evaluate", "latest", "--checkpoint="], "--checkpoint"),
        (["predict", "--split", "", "latest"], "--split"),
        (["report", "latest", "-o", ""], "-o"),
        (["fit", "--config-dir", "", "model=mlp"], "--config-dir"),
    ],
)
def test_an_option_is_not_its_default(
    arguments: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == USER_MUST_CHANGE
    assert capsys.readouterr().err.startswith(f"trainer: {option}: its value is empty")
    assert len(list((tmp_path / "runs").iterdir())) == 1
