"""Modules that optimize manually learn the same under fsdp as under ddp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks


def test_manual_optimization_trains_sharded_networks_as_whole_ones(tmp_path: Path) -> None:
    """Two gloo ranks. The backward passes run inside `training_step`, before a hook on its outputs could see them."""
    output = tmp_path / "found.json"
    run_ranks(2, Path(__file__).with_name("manual_rank.py"), [str(output)], tmp_path, 120.0)
    found = json.loads(output.read_text())
    assert found["fsdp"] == pytest.approx(found["ddp"], rel=1e-5, abs=1e-7)
    assert max(abs(a - b) for a, b in zip(found["fsdp"], found["start"], strict=True)) > 0.01
    assert "Loose optimizes manually, and scale is not in a submodule" in found["refused"]
