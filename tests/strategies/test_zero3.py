"""ZeRO-3 never holds a whole model, on the host or on the device."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.ranks import run_ranks
from tests.strategies.zero3_rank import LAYERS, WIDTH


def test_one_parameter_is_whole_at_a_time(tmp_path: Path) -> None:
    """Two ranks: half of the model each, and at most three copies of the parameter that is being partitioned."""
    output = tmp_path / "found.json"
    run_ranks(2, Path(__file__).with_name("zero3_rank.py"), [str(output)], tmp_path, 120.0)
    found = json.loads(output.read_text())
    layer = WIDTH * WIDTH * 4
    assert found["before"] == 0
    assert found["shards"] == LAYERS * layer // 2
    assert found["shards"] <= found["peak"]
    assert found["peak"] < LAYERS * layer // 2 + 3.5 * layer < LAYERS * layer
    assert found["whole_after"] == 0
    assert found["loss"] == found["expected"]
