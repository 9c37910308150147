"""Layers that are thawed after DDP was set up are trained as if one process had all the samples."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.ranks import run_ranks


def test_thawed_layers_are_averaged(tmp_path: Path) -> None:
    """By a callback and by the module's own hook, in the lean loop and in Lightning's."""
    outputs = run_ranks(2, Path(__file__).with_name("thawed_rank.py"), [], tmp_path, timeout_s=240)
    assert all("as one process" in output for output in outputs)
