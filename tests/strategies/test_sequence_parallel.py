"""`strategy.sequence_parallel` and `loss_parallel` on four gloo ranks, two of which share each layer: the losses of
`tp` without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_ranks
from tests.strategies.sequence_rank import LENGTH, STEPS
from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.core.errors import UserError
from trainer.strategies.tensor_parallel import _split, parallelize

RANK = Path(__file__).with_name("sequence_rank.py")
WITHIN = {"gpt2": 1e-5, "untied": 1e-5, "bf16": 5e-3}
"""Largest relative difference of a loss and of the norm of a weight: sums have another order."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sequence")
    run_ranks(4, RANK, [str(folder)], folder, 120.0)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", WITHIN)
def test_losses_and_checkpoints_equal_those_without_it(trained: dict[str, dict[str, Any]], kind: str) -> None:
    expected, found = trained[kind], trained[f"{kind}-sequence"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=WITHIN[kind])
    assert len(set(found["losses"])) == STEPS
    assert found["evaluated"][0] == pytest.approx(expected["evaluated"][0], rel=10 * WITHIN[kind])
    if kind != "bf16":
        assert found["evaluated"][1] == expected["evaluated"][1]  # correct predictions
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * WITHIN[kind], abs=1e-4)


def test_a_block_has_half_of_the_positions(trained: dict[str, dict[str, Any]]) -> None:
    assert trained["gpt2"]["lengths"] == [LENGTH]
    assert trained["untied-sequence"]["lengths"] == trained["gpt2-sequence"]["lengths"] == [LENGTH // 2]


def test_a_rank_has_its_part_of_a_split_output_layer(trained: dict[str, dict[str, Any]]) -> None:
    assert 2 * trained["untied-sequence"]["head"] == trained["untied"]["head"]


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
    with pytest.raises(UserError, match="Net has no output layer that can be split"):
        parallelize(Net(), TwoRanks(), loss=True)  # type: ignore[arg-type]


def test_a_tied_output_layer_is_refused_at_the_prompt() -> None:
    given = ["experiment=shakespeare", "strategy=tp", "strategy.loss_parallel=true", "resources.gpus=0"]
    with pytest.raises(UserError, match=r"with model\.tied=true the output layer is the embedding") as refused:
        check(compose(given, config_dirs=[]).config, fits=False)
    assert "model.tied=false" in refused.value.fix
