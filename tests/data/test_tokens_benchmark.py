"""benchmarks/tokens on a small file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tokens"


def test_prints_its_table_and_reads_in_memory_that_does_not_grow() -> None:
    """The rate is not judged here: a busy machine says nothing of it."""
    small = ["--megabytes", "40", "--turns", "12", "--block", "30"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *small], capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "memory grows" not in done.stderr
    assert "| ours |" in done.stdout
    assert "Memory of the process's own after turn 1, 6 and 12" in done.stdout
