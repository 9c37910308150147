"""`strategy.sequence_parallel` on four gloo ranks, two of which share each layer: the losses of `tp` without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_ranks
from tests.strategies.sequence_rank import LENGTH, STEPS
from trainer.core.errors import UserError
from trainer.strategies.tensor_parallel import _split, parallelize

RANK = Path(__file__).with_name("sequence_rank.py")
WITHIN = {"": 1e-5, "gpt2": 1e-5, "bf16": 5e-3}
"""Largest relative difference of a loss and of the norm of a weight: sums have another order."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sequence")
    run_ranks(4, RANK, [str(folder)], folder, 120.0)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", WITHIN)
def test_losses_and_checkpoints_equal_those_without_it(trained: dict[str, dict[str, Any]], kind: str) -> None:
    expected, found = trained[kind or "whole"], trained[f"{kind}-sequence" if kind else "sequence"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=WITHIN[kind])
    assert len(set(found["losses"])) == STEPS
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * WITHIN[kind], abs=1e-4)


def test_a_block_has_half_of_the_positions(trained: dict[str, dict[str, Any]]) -> None:
    assert trained["whole"]["lengths"] == [LENGTH]
    assert trained["sequence"]["lengths"] == trained["gpt2-sequence"]["lengths"] == [LENGTH // 2]


class TwoRanks:
    """The size of a mesh is all that the refusals read."""

    def size(self) -> int:
        return 2


def test_a_sequence_that_does_not_divide_and_a_network_without_the_declaration_are_refused() -> None:
    with pytest.raises(UserError, match="a sequence of 7 is not divisible by 2 ranks"):
        _split(torch.zeros(1, 7, 4), TwoRanks())  # type: ignore[arg-type]

    class Net(nn.Module):
        def tensor_parallel(self) -> dict[str, str]:
            return {}

    with pytest.raises(UserError, match="Net does not declare where to split the sequence") as refused:
        parallelize(Net(), TwoRanks(), sequence=True)  # type: ignore[arg-type]
    assert "sequence_parallel()" in refused.value.fix
