"""Which parts of a model are blocks, and that preparing them changes neither names nor gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.strategy import Auto, Ddp, Fsdp, Hsdp, Single, Tp
from trainer.core.errors import UserError
from trainer.models.transformer import Transformer
from trainer.strategies import data_parallel, mesh_sizes, resolved
from trainer.strategies.blocks import _saved_operators, blocks_of, prepare


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


def test_selective_keeps_every_attention_kernel_of_this_torch() -> None:
    """By another list than that of the code: the schemas, which also a release with new kernels has."""
    kept = {str(operator) for operator in _saved_operators()}
    kernels = [
        f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::_scaled_dot_product_") and "backward" not in schema.name
    ]
    assert len(kernels) >= 6
    assert kept.issuperset(kernels)
    for name in ("cudnn", "flash", "efficient"):
        assert f"aten._scaled_dot_product_{name}_attention.default" in kept
    assert {"aten._flash_attention_forward.default", "torch_attn._varlen_attn.default", "flex_attention"} <= kept


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "math", "cpu"])
def test_selective_computes_attention_once(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors the kernels of GPUs run, too: `scaled_dot_product_attention` is made to choose each of them."""
    aten = torch.ops.aten
    kernels: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "flash": (aten._scaled_dot_product_flash_attention, (0.0, True)),
        "efficient": (aten._scaled_dot_product_efficient_attention, (None, True, 0.0, True)),
        "cudnn": (aten._scaled_dot_product_cudnn_attention, (None, True, 0.0, True)),
        "math": (aten._scaled_dot_product_attention_math, (None, 0.0, True)),
    }
    if kernel in kernels:
        operator, arguments = kernels[kernel]
        chosen = lambda query, key, value, **_: operator(query, key, value, *arguments)[0]  # noqa: E731
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", chosen)
    counts = {}
    for kind in ("none", "selective", "full"):
        with FakeTensorMode(), Counted() as counted:
            network = Transformer(vocab_size=11, sequence_length=16, dim=16, layers=2, heads=2)
            prepare(network, Single(activation_checkpointing=kind))  # type: ignore[arg-type]
            network(torch.zeros(2, 16, dtype=torch.long)).sum().backward()
        names = ("aten.bmm.default",) if kernel == "math" else tuple(counted.calls)
        counts[kind] = sum(
            counted.calls[name]
            for name in names
            if name == "aten.bmm.default" or ("scaled_dot_product" in name and "backward" not in name)
        )
    assert counts["selective"] == counts["none"] > 0
    assert counts["full"] > counts["none"]


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
    assert type(resolved(Auto(), 1, "cuda")) is Single
    assert type(resolved(Auto(), 8, "cuda")) is Fsdp
    chosen = resolved(Auto(activation_checkpointing="full"), 2, "cpu")
    assert type(chosen) is Ddp
    assert chosen.activation_checkpointing == "full"
