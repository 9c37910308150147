"""Ranks that log different values decide alike, by the first one's."""

from __future__ import annotations

import json
from pathlib import Path

from tests.callbacks import best_rank
from tests.distributed.ranks import run_ranks


def test_two_ranks_save_the_same_validations_and_refuse_the_same_metric(tmp_path: Path) -> None:
    run_ranks(2, Path(best_rank.__file__), [str(tmp_path)], tmp_path, timeout_s=240)
    first, second = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert first == second
    saved, refused = first
    assert saved == [[1, 0.5], [2, 0.6]]
    assert "checkpoint.monitor=val/accuracy: the first validation did not log it; it logged val/acc" in refused
