"""Buffers under DDP: the model is the one that DDP trains, with fewer broadcasts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.strategies.buffers_rank import FREEZES_AT, STEPS

KINDS = ("norm", "other", "frozen", "averaged", "none")
Found = list[dict[str, Any]]
"""By rank, then by scenario."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("buffers")
    scenarios = [(kind, chosen) for kind in KINDS for chosen in ("always", "auto")]
    scenarios += [("norm", "evaluation"), ("other", "evaluation")]
    script = Path(__file__).with_name("buffers_rank.py")
    run_ranks(2, script, [json.dumps(scenarios), str(folder)], folder, 800.0)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_every_loss_are_those_of_ddp(found: Found, kind: str) -> None:
    for rank in range(2):
        assert len(found[rank][f"{kind}-auto"]["losses"]) == STEPS
        assert found[rank][f"{kind}-auto"]["losses"] == found[rank][f"{kind}-always"]["losses"]
    assert found[0][f"{kind}-auto"]["state"] == found[0][f"{kind}-always"]["state"]


@pytest.mark.parametrize(
    ("scenario", "sent"),
    [
        ("norm-always", STEPS - 1 + 2),  # torch: also as it begins to evaluate, and then not before the step after it
        ("norm-auto", 0),
        ("norm-evaluation", 0),
        ("other-auto", STEPS - 1),
        ("other-evaluation", 0),
        ("frozen-auto", STEPS - FREEZES_AT),
        ("averaged-auto", STEPS - 1 + 2),
        ("none-always", 0),
    ],
)
def test_buffers_are_sent_before_a_forward_pass_that_reads_them(found: Found, scenario: str, sent: int) -> None:
    assert [one[scenario]["sent"] for one in found] == [sent, sent]


@pytest.mark.parametrize("scenario", ["norm-auto", "norm-evaluation", "other-auto", "other-evaluation", "frozen-auto"])
def test_every_rank_evaluates_with_the_buffers_of_rank_0(found: Found, scenario: str) -> None:
    first, second = (one[scenario]["evaluated"] for one in found)
    assert len(first) == 2
    assert first[0] != first[1]
    assert first == second
