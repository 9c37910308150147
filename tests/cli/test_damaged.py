"""Run folders that something has damaged: one message from every command, and the other runs are still listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.test_commit import save
from tests.cli.test_why import real_run
from trainer.checkpoint import commit
from trainer.checkpoint.store import CheckpointStore
from trainer.cli import main
from trainer.cli import why as a_verb
from trainer.core import records
from trainer.core.errors import USER_MUST_CHANGE
from trainer.launch.local import LocalLauncher
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


LEFT_OUT = "this record is left out"
RECORDS = {
    "attempt of a wrong type": ("attempts/attempt-00.json", '{"outcome": 3}', "outcome is 3, not one of finished"),
    "attempt without an outcome": ("attempts/attempt-00.json", '{"step": 3}', "outcome is missing"),
    "newer attempt": ("attempts/attempt-00.json", '{"version": 2}', "has version 2; this trainer reads up to 1"),
    "event of a wrong type": ("events.jsonl", '{"time": "now", "event": "started"}\n', 'time is "now", not a number'),
    "unknown event": ("events.jsonl", '{"time": 1, "event": "danced"}\n', "event is 'danced', which is not the name"),
    "newer event": ("events.jsonl", '{"time": 1, "event": "started", "version": 2}\n', "line 1, has version 2;"),
    "heartbeat of a wrong type": ("live/rank-0.json", '{"phase": "train", "step": "3"}', 'step is "3", not an integer'),
    "newer heartbeat": ("live/rank-0.json", '{"phase": "train", "version": 2}', "has version 2;"),
}
"""What is left out, and named: the rest of the run is shown, and it is resumed."""
LAUNCHES = {
    "cut": ('{"pid": 1', "is damaged: Expecting"),
    "wrong type": ('{"pid": "1"}', 'is damaged: pid is "1", not an integer'),
    "wrong type inside": ('{"shape": {"nodes": "1"}}', 'is damaged: shape.nodes is "1", not an integer'),
    "newer": ('{"version": 2}', "has version 2; this trainer reads up to 1"),
}
"""launch.json says whether the run lives: without it nothing is done to the run."""


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


def typed(verb: str, run: RunDirectory) -> list[str]:
    return {"ls": ["ls"], "resume": ["resume", run.id, "--detach"]}.get(verb, [verb, run.id])


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_cannot_be_used_is_named_and_the_rest_is_shown(
    run: RunDirectory, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content, problem = RECORDS[name]
    (run.path / file).write_text(content)
    resumed: list[RunDirectory] = []
    monkeypatch.setattr(LocalLauncher, "launch", lambda self, run: resumed.append(run))
    reported = []
    for verb in ("show", "why", "ls", "resume"):
        monkeypatch.setattr(records, "_skipped", set())  # each verb is a process of its own
        assert main(typed(verb, run)) == 0, verb
        said = capsys.readouterr()
        assert run.id in said.out, verb
        assert "Traceback" not in said.out + said.err
        for line in said.err.splitlines():
            assert line.startswith(f"trainer: {run.path / file}")
            assert problem in line
            assert line.endswith(LEFT_OUT)
            reported.append(verb)
    assert reported[:1] == ["show"]
    assert len(reported) == len(set(reported))
    assert [one.path for one in resumed] == [run.path]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_that_cannot_be_used_is_refused_by_name(
    run: RunDirectory, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, problem = LAUNCHES[name]
    other = real_run(tmp_path)
    run.launch_path.write_text(content)
    for verb in ("show", "why", "stop", "resume"):
        assert main(typed(verb, run)) == USER_MUST_CHANGE, verb
        said = capsys.readouterr().err
        assert said.startswith(f"trainer: {run.launch_path} ")
        assert problem in said
    assert main(["ls"]) == 0
    said = capsys.readouterr()
    assert other.id in said.out
    assert run.id not in said.out
    assert f"trainer: skipped {run.path.name}: {run.launch_path} " in said.err
    assert problem in said.err


def test_a_commit_of_a_newer_format_is_refused_by_name(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(run.checkpoints_dir)
    save(store, 4)
    path = store.path(4)
    content = json.loads((path / commit.COMMIT).read_text())
    del content["digest"]
    content["format"] = commit.FORMAT + 1
    (path / commit.COMMIT).write_text(json.dumps({**content, "digest": commit._digest(content)}))
    other = real_run(tmp_path)
    assert main(["show", run.id]) == USER_MUST_CHANGE
    newer = (
        f"{path} has checkpoint format {commit.FORMAT + 1}; this version of trainer reads formats up to {commit.FORMAT}"
    )
    assert newer in capsys.readouterr().err
    assert main(["ls"]) == 0
    said = capsys.readouterr()
    assert other.id in said.out
    assert newer in said.err


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
