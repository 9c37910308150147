"""`trainer init`: what it writes passes check and trains."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.core.errors import USER_MUST_CHANGE

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_project_trains_as_it_is(trainer_cli: Command, workdir: Path) -> None:
    assert trainer_cli("init", "my-net").returncode == 0
    project = workdir / "my-net"
    left = [path for path in project.rglob("*") if path.is_file() and "{{" in path.read_text()]
    assert left == []
    overrides = ["experiment=mine", "trainer.max_epochs=4", "tracking=none"]
    overrides += ["resources.gpus=0", "resources.cpu_processes=1"]
    assert trainer_cli("check", *overrides, cwd=project).returncode == 0
    done = trainer_cli("fit", *overrides, cwd=project, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    best = next(line for line in done.stdout.splitlines() if line.strip().startswith("best"))
    assert float(best.split("val/acc ")[1].split()[0]) > 0.9
    assert (project / ".gitignore").read_text().count("runs/") == 1
    predicted = trainer_cli("predict", "--split", "val", cwd=project)
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr


@pytest.mark.parametrize("name", ["torch", "json", "trainer", "class", "Class", "a b", "1st", "", "../x/..", "taken"])
def test_names_that_would_not_work_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    assert main(["init", name]) == USER_MUST_CHANGE
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
