"""Loaders of every kind on two ranks: each sample once an epoch, never the same on both, and exact after a resume."""

from __future__ import annotations

from pathlib import Path

from tests.data.kinds import KINDS
from tests.distributed.ranks import run_ranks


def test_every_kind_on_two_ranks(tmp_path: Path) -> None:
    outputs = run_ranks(2, Path(__file__).with_name("kinds_rank.py"), [str(tmp_path)], tmp_path, timeout_s=240)
    for output in outputs:
        done = [line.removeprefix("ok ").rpartition(" ")[0] for line in output.splitlines() if line.startswith("ok ")]
        assert done == list(KINDS), output[-4000:]
    said = outputs[0]
    assert "DataLoader over Stream: every rank reads the same batches, so they take turns" in said
    assert "DataLoader over Stream: each rank reads different batches; they are not sharded again" in said
    assert "DataLoader over Ids: its sampler gives each rank different samples; they are not sharded again" in said
    assert "DataLoader over Stream: rank 1 has only 6 batches, other ranks have more: the epoch ends here" in said
