"""The lean loop on two gloo ranks: equal to Lightning's, without its broadcast on every batch."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.ranks import run_ranks


def test_two_ranks(tmp_path: Path) -> None:
    outputs = run_ranks(2, Path(__file__).with_name("two_loops_rank.py"), [], tmp_path, timeout_s=240)
    assert ["6 scenarios equal" in output for output in outputs] == [True, True]
