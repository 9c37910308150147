"""The benchmarks still run, and find the same weights in every variant. Nothing here looks at a time."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.executed
def test_parity_of_one_short_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`parity` itself fails where weights or losses differ in one bit.

    In this process, which has torch and Lightning: `parity` imports them to start others that do so again.
    """
    options = ["--model", "mlp", "--ranks", "1", "--rounds", "1", "--blocks", "2", "--out", str(tmp_path / "out.json")]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["parity", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "parity"), run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code in (0, 1), f"{ended.value.code}\n{printed.err}"  # 1: a target of time was missed
    found = json.loads((tmp_path / "out.json").read_text())
    (case,) = found["cases"]
    assert set(case["summary"]["rows"]) >= {"bare", "ours", "lightning"}
    assert "| mlp | 1 |" in printed.out


def test_a_step_that_is_not_logged_never_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one rank; `host_reads` without options runs every strategy, and fails at any read.

    In this process, so that the one that imports torch is forked.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["host_reads", "--strategy", "single", "--precision", "bf16-mixed"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "host_reads"), run_name="__main__")
    printed = "".join(capsys.readouterr())
    assert ended.value.code == 0, printed
    assert "| single | 1 | bf16-mixed | 1.0 | 0 | 0 | 1 |" in printed
    assert "| single | 1 | bf16-mixed | none | 0 | 0 | 1 |" in printed


@pytest.mark.slow
@pytest.mark.executed
def test_a_start_and_a_restart_are_timed_either_way(no_orphans: None) -> None:
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "start.py"), "--ranks", "1", "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "| 1 | forked |" in ended.stdout
    assert "| 1 | each imports |" in ended.stdout


@pytest.mark.slow
@pytest.mark.executed
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["overhead.py", "--rounds", "1", "--blocks", "40"], "| 2 | "),
        (["checkpoints.py", "--gib", "0.0625", "--rounds", "1"], "| sharded | "),
        (["commands.py", "--rounds", "1"], "| trainer check | "),
        (["watching.py"], "| 512 | 4096 | "),
        (["tokens", "--megabytes", "20", "--turns", "2"], "| ours | "),
        (["agreement.py", "--ranks", "16", "--saves", "8"], "| 16 | tree | "),
    ],
    ids=lambda value: value[0].partition(".")[0] if isinstance(value, list) else "",
)
def test_a_benchmark_comes_to_its_end(command: list[str], expected: str, no_orphans: None) -> None:
    """Nothing else runs these: what they call may have been renamed."""
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:]], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode in (0, 1), ended.stderr  # 1: a target of time was missed
    assert expected in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.executed
def test_lightnings_suite_names_what_fails_with_our_loop_only(tmp_path: Path) -> None:
    """On a stand-in for a clone of Lightning, with a test of each outcome."""
    folder = tmp_path / "tests" / "tests_pytorch"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (folder / "test_some.py").write_text(
        """
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

OFF = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=3)

def test_trains():
    trainer = Trainer(**OFF)
    trainer.fit(BoringModel())
    assert trainer.global_step == 3

def test_wants_the_very_class():
    assert type(Trainer(**OFF).fit_loop.epoch_loop) is _TrainingEpochLoop

def test_never():
    raise ValueError

@pytest.mark.skip
def test_not_here():
    pass
"""
    )
    command = [sys.executable, str(BENCHMARKS / "lightning_suite.py"), str(tmp_path), "tests_pytorch"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1, ended.stderr
    assert "| 4 | 1 | 2 | 1 | 0 | 1 | 3 |" in ended.stdout
    newly = [line for line in ended.stdout.splitlines() if line.startswith("newly failing")]
    assert newly == ["newly failing: tests/tests_pytorch/test_some.py::test_wants_the_very_class"]
