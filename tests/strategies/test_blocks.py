"""Which parts of a model are blocks, and that preparing them changes neither names nor gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.config.strategy import Auto, Ddp, Fsdp, Hsdp, Single, Tp
from trainer.core.errors import UserError
from trainer.models.transformer import Transformer
from trainer.strategies import auto_choice, data_parallel, mesh_sizes
from trainer.strategies.blocks import blocks_of, prepare


def small() -> Transformer:
    torch.manual_seed(0)
    return Transformer(vocab_size=11, sequence_length=6, dim=16, layers=2, heads=2)


def test_a_network_that_says_its_blocks_is_believed() -> None:
    network = small()
    assert blocks_of(nn.Sequential(network)) == list(network.body)


def test_repeated_members_of_lists_are_blocks_of_an_unknown_network() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    network = nn.ModuleDict({"encoder": encoder, "head": nn.Sequential(nn.Linear(8, 2), nn.ReLU())})
    assert blocks_of(network) == list(encoder.layers)
    assert blocks_of(nn.Linear(2, 2)) == []


def test_a_class_may_be_named() -> None:
    network = small()
    assert len(blocks_of(network, "Attention")) == 2
    with pytest.raises(UserError, match="Attenton"):
        blocks_of(network, "Attenton")


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputing_gives_the_same_gradients_under_the_same_names(kind: str) -> None:
    tokens = torch.arange(12).view(2, 6) % 11
    gradients = []
    for chosen in ("none", kind):
        network = small()
        names = [name for name, _ in network.named_parameters()]
        prepare(network, Single(activation_checkpointing=chosen))
        assert [name for name, _ in network.named_parameters()] == names
        network(tokens).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_the_mesh_follows_from_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert mesh_sizes(Fsdp(), 8) == (1, 8, 1)
    assert mesh_sizes(Hsdp(), 8) == (2, 4, 1)
    assert mesh_sizes(Hsdp(shard_size=2), 8) == (4, 2, 1)
    assert mesh_sizes(Tp(), 8) == (1, 2, 4)
    assert mesh_sizes(Tp(tensor_parallel_size=2), 8) == (1, 4, 2)
    with pytest.raises(UserError, match="tensor_parallel_size=3"):
        mesh_sizes(Tp(tensor_parallel_size=3), 8)
    assert [data_parallel(Tp(tensor_parallel_size=2), rank, 4) for rank in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert data_parallel(Ddp(), 3, 4) == (3, 4)


def test_auto_follows_its_rule() -> None:
    assert type(auto_choice(Auto(), 1, "cuda")) is Single
    assert type(auto_choice(Auto(), 8, "cuda")) is Fsdp
    chosen = auto_choice(Auto(activation_checkpointing="full"), 2, "cpu")
    assert type(chosen) is Ddp
    assert chosen.activation_checkpointing == "full"
