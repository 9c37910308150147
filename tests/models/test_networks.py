"""The networks: published parameter counts on the meta device, shapes, and that each can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from trainer.errors import UserError
from trainer.models.mlp import MLP
from trainer.models.resnet import ResNet
from trainer.models.rotary import Rotary
from trainer.models.transformer import Transformer
from trainer.paths import conf_dir

KINDS = {"trainer.models.mlp.MLP": MLP, "trainer.models.resnet.ResNet": ResNet}
KINDS["trainer.models.transformer.Transformer"] = Transformer


def build(name: str, **facts: Any) -> nn.Module:
    """The model of conf/model/NAME.yaml, with what is null there filled from `facts`."""
    node = yaml.safe_load((Path(conf_dir()) / "model" / f"{name}.yaml").read_text())
    kind = KINDS[node.pop("_target_")]
    return kind(**{key: facts.get(key) if value is None else value for key, value in node.items()})


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("gpt2_124m", 124_439_808),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build(name, input_shape=[3, 224, 224], num_classes=1000)
    assert count(model) == parameters


def test_the_default_transformer_has_about_three_million() -> None:
    assert 3.0e6 < count(build("transformer", vocab_size=256, sequence_length=128)) < 3.6e6


def fall_of_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, steps: int = 25) -> float:
    """Loss after some steps on one batch over the loss before them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        logits = model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


@pytest.mark.parametrize(
    "model",
    [
        MLP([1, 8, 8], 10, hidden=[32], dropout=0.1, norm="batch"),
        MLP([1, 8, 8], 10, hidden=[32, 16], norm="layer"),
        ResNet([1, 8, 8], 10, depth=None, layers=[1, 1], width=8, stem="small"),
        ResNet([1, 8, 8], 10, depth=None, layers=[1, 1], block="bottleneck", width=4, stem="imagenet"),
    ],
    ids=["mlp-batch", "mlp-layer", "basic", "bottleneck"],
)
def test_classifiers_learn(model: nn.Module) -> None:
    torch.manual_seed(0)
    targets = torch.arange(40) % 10
    inputs = torch.randn(10, 1, 8, 8)[targets] + 0.3 * torch.randn(40, 1, 8, 8)
    assert model(inputs).shape == (40, 10)
    assert fall_of_loss(model, inputs, targets) < 0.6


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True, "dropout": 0.1},
    "llama": {"kv_heads": 2, "tied": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_decoders_learn_and_do_not_see_the_future(shape: str) -> None:
    torch.manual_seed(0)
    model = Transformer(32, 16, dim=32, layers=2, heads=4, **SHAPES[shape])
    tokens = torch.randint(0, 32, (4, 17))
    assert fall_of_loss(model, tokens[:, :-1], tokens[:, 1:]) < 0.8
    model.eval()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 32
    before, after = model(tokens[:, :16]), model(changed[:, :16])
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    rotary = Rotary(8, 32, 10_000.0)
    rotary.reset_parameters()
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 8).expand(1, 1, 32, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 32, 8)
    angles = rotary.angles(32)
    scores = (Rotary.turn(query, angles) @ Rotary.turn(key, angles).transpose(-1, -2))[0, 0]
    assert torch.allclose(scores[5, 2], scores[20, 17], atol=1e-5)
    assert not torch.allclose(scores[5, 2], scores[5, 3], atol=1e-3)


def test_shared_key_heads_equal_repeated_ones() -> None:
    torch.manual_seed(0)
    shared = Transformer(16, 8, dim=16, layers=1, heads=4, kv_heads=2)
    whole = Transformer(16, 8, dim=16, layers=1, heads=4)
    state = shared.state_dict()
    for name in ("key", "value"):
        weight = state[f"body.0.attention.{name}.weight"].view(2, 4, 16)
        state[f"body.0.attention.{name}.weight"] = weight.repeat_interleave(2, dim=0).reshape(16, 16)
    whole.load_state_dict(state)
    tokens = torch.randint(0, 16, (2, 8))
    assert torch.allclose(shared(tokens), whole(tokens), atol=1e-6)


def test_a_model_from_the_meta_device_is_completed_by_init_weights() -> None:
    """What sharding strategies do with a model that is too big to be made at once."""
    with torch.device("meta"):
        model = Transformer(16, 8, dim=16, layers=2, heads=2)
    model.to_empty(device="cpu")
    model.tie()
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    expected = Transformer(16, 8, dim=16, layers=2, heads=2)
    torch.manual_seed(0)
    expected.init_weights()
    tokens = torch.randint(0, 16, (2, 8))
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model(tokens), expected(tokens))


@pytest.mark.parametrize(
    "model",
    [
        MLP([4], 2, hidden=[8, 8]),
        ResNet([1, 8, 8], 2, depth=None, layers=[1, 1], width=4),
        Transformer(16, 8, dim=16, layers=2, heads=2),
    ],
    ids=["mlp", "resnet", "transformer"],
)
def test_blocks_are_the_repeated_parts(model: nn.Module) -> None:
    blocks = model.blocks()  # type: ignore[operator]
    assert len(blocks) == 2
    modules = list(model.modules())
    assert all(any(block is module for module in modules) for block in blocks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet([1, 8, 8], 2, depth=42), "model.depth=42 is not a ResNet"),
        (lambda: ResNet([1, 8, 8], 2, stem="wide"), "model.stem=wide is not known"),
        (lambda: ResNet([1, 8, 8], 2, depth=None), "either model.depth or model.layers"),
        (lambda: MLP([4], 2, norm="group"), "model.norm=group is not known"),
        (lambda: Transformer(16, 8, dim=30, heads=4), "model.dim=30, model.heads=4"),
        (lambda: Transformer(16, 8, norm="batch"), "model.norm=batch is not known"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
