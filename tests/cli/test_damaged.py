"""Run folders that something has damaged: one message from every command, and the other runs are still listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_why import real_run
from trainer.cli import main
from trainer.cli import why as a_verb
from trainer.runs.directory import RunDirectory

VERBS = ("show", "resume", "evaluate", "predict", "export", "why", "logs", "stop")
DAMAGES = {
    "not YAML": ("config.yaml", "{ ["),
    "no keys": ("config.yaml", "a sentence"),
    "wrong type": ("config.yaml", "trainer: {max_epochs: banana}"),
    "a section missing": ("config.yaml", "seed: 1"),
    "launch.json cut": ("launch.json", '{"pid": 1'),
    "attempt cut": ("attempts/attempt-00.json", '{"outc'),
    "commit cut": ("checkpoints/step-00000004/COMMIT", '{"st'),
    "events cut": ("events.jsonl", '{"event": "crea'),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")  # what nobody foresaw is raised here
    return real_run(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_one_message(run: RunDirectory, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content = DAMAGES[damage]
    path = run.path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    for verb in VERBS:
        if verb == "resume" and file != "config.yaml" and file != "launch.json":
            continue  # it would be started
        code = main([verb, run.id])
        said = capsys.readouterr()
        assert code in (0, 1, 2, 3), verb
        assert "Traceback" not in said.out + said.err
        assert code == 0 or said.err.startswith("trainer: "), (verb, said.err)


def test_the_others_are_listed_beside_a_damaged_one(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = real_run(tmp_path)
    run.config_path.write_text("{ [")
    assert main(["ls"]) == 0
    said = capsys.readouterr()
    assert other.id in said.out
    assert f"skipped {run.path.name}: {run.config_path} cannot be read" in said.err


def test_what_nobody_foresaw_is_one_message_and_a_file(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRAINER_TRACEBACK")

    def surprise(argv: list[str]) -> int:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(a_verb, "main", surprise)
    assert main(["why"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "trainer: ZeroDivisionError: by zero"
    file = Path(second.rpartition(" ")[2])
    assert "Traceback (most recent call last)" in file.read_text()
    file.unlink()
