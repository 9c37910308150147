"""`trainer check` as a command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def test_prints_the_plan_and_writes_nothing(trainer_cli: Command, workdir: Path) -> None:
    done = trainer_cli("check", "resources.gpus=0")
    assert done.returncode == 0
    assert "32 samples a step = 2 ranks x 16" in done.stdout
    assert "nothing wrong found" in done.stdout
    assert list(workdir.iterdir()) == []


def test_json_of_what_is_right(trainer_cli: Command) -> None:
    found = json.loads(trainer_cli("check", "--json", "-m", "resources.gpus=0", "seed=1,2").stdout)
    assert found["ok"] is True
    assert [job["overrides"][-1] for job in found["jobs"]] == ["seed=1", "seed=2"]
    assert found["jobs"][0]["shape"] == {"nodes": 1, "processes_per_node": 2, "device": "cpu"}


def test_json_of_what_is_wrong(trainer_cli: Command) -> None:
    done = trainer_cli("check", "--json", "resources.gpus=0", "trainer.max_steps=0", "seed=-1")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert [problem["message"].partition("=")[0] for problem in found["problems"]] == ["trainer.max_steps", "seed"]
    assert all(problem["fix"] for problem in found["problems"])
