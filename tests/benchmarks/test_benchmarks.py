"""The benchmarks still run, and find the same weights in every variant. Nothing here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_parity_of_one_short_round(tmp_path: Path) -> None:
    """`parity` itself fails where weights or losses differ in one bit."""
    options = ["--model", "mlp", "--ranks", "1", "--rounds", "1", "--blocks", "2", "--out", str(tmp_path / "out.json")]
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "parity"), *options], capture_output=True, text=True, timeout=200
    )
    assert ended.returncode in (0, 1), ended.stderr  # 1: a target of time was missed
    found = json.loads((tmp_path / "out.json").read_text())
    (case,) = found["cases"]
    assert set(case["summary"]["rows"]) >= {"bare", "ours", "lightning"}
    assert "| mlp | 1 |" in ended.stdout


@pytest.mark.slow
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
