"""Validation of options: exit code 2 and one message, before anything is read or launched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.core.errors import USER_MUST_CHANGE

MISTAKES = [
    ("bench faults --at-once 0", r"--at-once 0 must be at least 1"),
    ("bench faults --kinds kil", r"--kinds: unknown fault kil\n  did you mean kill\? use one of: .*segfault"),
    ("bench", r"the following arguments are required: {faults,devices}"),
    ("bench speed", r"invalid choice: 'speed' \(choose from '?faults'?\)"),
    ("check --deap", r"unrecognized arguments: --deap\n  did you mean --deep\? see trainer check --help"),
    ("data", r"the following arguments are required: tokenize"),
    ("data tokenize only-one", r"needs an input and an output folder\n  trainer data tokenize IN OUT"),
    ("data tokenize a b --vocab-size many", r"--vocab-size: invalid int value: 'many'"),
    ("evaluate --split train", r"--split: invalid choice: 'train'"),
    ("export --keep-lora --format onnx", r"--keep-lora: --format=onnx cannot hold LoRA adapters"),
    ("export --keep-lora --format hf", r"--keep-lora: --format=hf cannot hold LoRA adapters"),
    ("export --format gguf", r"--format: invalid choice: 'gguf'"),
    ("fit --package trainer", r"--package changes what --cfg prints\n  add --cfg job, or leave --package out"),
    ("fit --resolve", r"--resolve changes what --cfg prints"),
    ("fit --follow --detach", r"--detach: not allowed with argument --follow"),
    ("fit --trainer.max_epochs 5", r"unrecognized arguments: .*\n  write trainer\.max_epochs=5$"),
    ("fit --config job.yaml", r"\n  write experiment=job; job\.yaml becomes conf/experiment/job\.yaml, "),
    ("init", r"the following arguments are required: NAME"),
    ("init 1st", r"'1st' is not a valid project name"),
    ("init json", r"json: a Python module json already exists\n  choose another name, such as my-json"),
    ("logs --rank first", r"--rank: invalid int value: 'first'"),
    ("ls --state runing", r"--state: invalid choice: 'runing'"),
    ("predict --ranks 0", r"--ranks=0 must be at least 1"),
    ("resume --folow", r"did you mean --follow\? see trainer resume --help"),
    ("rm", r"the following arguments are required: RUN"),
    ("show --verfy", r"did you mean --verify\? see trainer show --help"),
    ("stop --wait soon", r"--wait: invalid float value: 'soon'"),
    ("sync --runs_dir=x", r"did you mean --runs-dir\? see trainer sync --help"),
    ("verify-resume --steps 2", r"--steps 2: too few to kill a job in between"),
    ("verify-resume --kills 0", r"--kills 0 must be at least 1"),
    ("why --jsn", r"did you mean --json\? see trainer why --help"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_message(
    command: str, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == USER_MUST_CHANGE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("trainer: ")
    assert re.search(message, output.err.strip()), output.err
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    "verb", ["compare", "evaluate", "export", "logs", "predict", "repro", "resume", "rm", "show", "stop", "why"]
)
def test_a_run_that_does_not_exist_is_one_message(verb: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "k3v9", "--runs-dir", str(workdir / "runs")]) == USER_MUST_CHANGE
    output = capsys.readouterr()
    assert output.out == ""
    first, *fix = output.err.splitlines()
    assert re.match(r"trainer: .*(k3v9|no runs)", first), first
    assert len(fix) <= 1
