"""benchmarks/tokens on a small file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tokens"


def test_reads_at_half_the_rate_of_a_bare_loop_in_memory_that_does_not_grow() -> None:
    small = ["--megabytes", "40", "--turns", "12", "--block", "30"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *small], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| ours |" in done.stdout
    assert "Memory of the process's own after turn 1, 6 and 12" in done.stdout
