"""Ranks that log different values decide alike, by the first one's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.callbacks import best_rank
from tests.distributed.ranks import run_ranks
from trainer.callbacks.best import BestMetric
from trainer.checkpoint.store import CheckpointStore
from trainer.config.schema import CheckpointOptions


def test_two_ranks_save_the_same_validations_and_refuse_the_same_metric(tmp_path: Path) -> None:
    run_ranks(2, Path(best_rank.__file__), [str(tmp_path)], tmp_path, timeout_s=240)
    first, second = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert first == second
    saved, refused = first
    assert saved == [[1, 0.5], [2, 0.6]]
    assert "checkpoint.monitor=val/accuracy: the first validation did not log it; it logged val/acc" in refused


@pytest.mark.parametrize(
    ("options", "restored"),
    [
        (CheckpointOptions(), ("val/acc", "max", True)),
        (CheckpointOptions(monitor="val/acc"), ("val/acc", "max", True)),
        (CheckpointOptions(monitor="val/acc", mode="min"), ("val/acc", "min", True)),
        (CheckpointOptions(monitor="val/loss"), ("val/loss", None, False)),
    ],
)
def test_the_direction_is_known_after_a_resume_in_mid_epoch(
    options: CheckpointOptions, restored: tuple[str, str | None, bool], tmp_path: Path
) -> None:
    """Checkpoints before the next validation record it, also if the configuration names the metric alone."""
    heartbeat: Any = SimpleNamespace(update=lambda **fields: None)
    best = BestMetric(options, None, CheckpointStore(tmp_path), heartbeat, None)
    best.load_state_dict({"best": None, "monitor": "val/acc", "mode": "max", "known": True})
    state = best.state_dict()
    assert (state["monitor"], state["mode"], state["known"]) == restored
