"""Four processes advance a sweep and are killed at moments that a seed draws: nothing is lost, nothing done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks/sweep_faults.py"


@pytest.mark.parametrize(("kills", "seeds"), [(15, 1), pytest.param(200, 2, marks=pytest.mark.slow)])
def test_killed_advancers_lose_and_double_nothing(kills: int, seeds: int, tmp_path: Path) -> None:
    for seed in range(seeds):
        methods = ["random"] if kills < 100 else ["random", "sobol", "tpe"]
        trials = 3 * kills if kills < 100 else kills  # so many that a busy machine has time for all kills
        done = subprocess.run(
            [
                sys.executable,
                str(BENCHMARK),
                f"--kills={kills}",
                f"--seed={seed}",
                f"--trials={trials}",
                "--methods",
                *methods,
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        for line in done.stdout.splitlines():
            answer = json.loads(line)
            assert answer["kills"] == kills
            assert answer["wrong"] == []
            assert answer["best"] == answer["best_unharmed"]
