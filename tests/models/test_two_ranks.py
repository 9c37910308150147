"""Every model on two gloo ranks against one rank with the joint batch; batch normalisation over the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_ranks
from tests.models import two_ranks
from trainer.models.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, two_ranks.Trained]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, Path(two_ranks.__file__), [str(folder)], folder, timeout_s=180)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", two_ranks.MODELS)
def test_two_ranks_equal_one_with_the_joint_batch(name: str, trained: list[dict[str, two_ranks.Trained]]) -> None:
    """Also the running statistics of batch normalisation, to the rounding of sums in another order."""
    losses, state = two_ranks.train(name, 0, 1)
    assert losses[-1] < losses[0]
    for found_losses, found in (rank[name] for rank in trained):
        assert found_losses == pytest.approx(losses, rel=1e-4)
        assert found.keys() == state.keys()
        for key, value in state.items():
            assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), key


def test_without_synchronisation_the_statistics_are_each_ranks_own(
    trained: list[dict[str, two_ranks.Trained]],
) -> None:
    _, joint = two_ranks.train("resnet-basic", 0, 1)
    _, separate = trained[0]["separate statistics"]
    key = "stem.1.running_var"
    assert not torch.allclose(separate[key], joint[key], rtol=1e-3, atol=1e-4)


def test_is_found_at_any_depth_and_keeps_what_it_replaces() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.BatchNorm1d(3, eps=0.1, momentum=0.5)))
    model(torch.randn(8, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model.eval()(torch.ones(2, 4))
    convert_sync_batch_norm(model, torch.device("cpu"))
    assert isinstance(model[1][0], SyncBatchNorm)
    assert (model[1][0].eps, model[1][0].momentum, model[1][0].training) == (0.1, 0.5, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(torch.ones(2, 4)), plain)
