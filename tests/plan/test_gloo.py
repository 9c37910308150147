"""What gloo allocates during a collective is what the plan counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plan.gloo_rank import ELEMENTS
from trainer.plan import gloo

ROOT = Path(__file__).parents[2]
COUNTER = ROOT / "benchmarks" / "planned_memory_held.c"
TOLERANCE = 1 << 14
"""Bytes: smaller blocks are not counted, and the allocator rounds others."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_allocates_what_is_counted(ranks: int, tmp_path: Path) -> None:
    library = tmp_path / "held.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(COUNTER)], check=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.plan.gloo_rank"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store")],
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(library)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [one.communicate(timeout=300)[0] for one in started]
    assert [one.returncode for one in started] == [0] * ranks
    for kind, sizes in json.loads(outputs[0].splitlines()[-1]).items():
        size = ELEMENTS * {"float32": 4, "bfloat16": 2}[kind]
        for name, measured in sizes.items():
            assert measured == pytest.approx(gloo.staged(name, size, ranks), abs=TOLERANCE), (kind, name)
