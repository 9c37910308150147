"""The networks: published parameter counts on the meta device, shapes, and that each can learn."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from trainer.core.errors import UserError
from trainer.core.paths import conf_dir
from trainer.models.mlp import MLP
from trainer.models.resnet import ResNet
from trainer.models.rnn import RecurrentClassifier, RecurrentDecoder
from trainer.models.rotary import Rotary, apply_rotary
from trainer.models.transformer import Transformer
from trainer.models.vgg import VGG
from trainer.models.vit import ViT


def build(name: str, **facts: Any) -> nn.Module:
    """The model of conf/model/NAME.yaml, with what is null there filled from `facts`."""
    node = yaml.safe_load((Path(conf_dir()) / "model" / f"{name}.yaml").read_text())
    module, _, kind_name = node.pop("_target_").rpartition(".")
    kind = getattr(import_module(module), kind_name)
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
        ("vgg11", 132_863_336),
        ("vgg13", 133_047_848),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
        ("vgg16_bn", 138_365_992),
        ("efficientnet_lite0", 4_652_008),
        ("vit_b16", 86_567_656),
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
        VGG(
            [1, 8, 8], 10, depth=None, convolutions=[1, 1], width=8, batch_norm=True, pooled=2, hidden=[32], dropout=0.1
        ),
        ViT([1, 8, 8], 10, patch=2, dim=32, layers=1, heads=2, dropout=0.1),
        RecurrentClassifier([1, 8, 8], 10, hidden=32, bidirectional=True),
        RecurrentClassifier([8, 8], 10, cell="gru", hidden=32, layers=2, dropout=0.1),
    ],
    ids=["mlp-batch", "mlp-layer", "basic", "bottleneck", "vgg", "vit", "lstm", "gru"],
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


def test_an_lstm_decoder_learns() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (4, 17))
    assert fall_of_loss(RecurrentDecoder(32, dim=16, hidden=32), tokens[:, :-1], tokens[:, 1:]) < 0.8


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_padding_changes_nothing(cell: str) -> None:
    torch.manual_seed(0)
    model = RecurrentClassifier([6, 3], 4, cell=cell, hidden=8, layers=2, bidirectional=True)
    long, short = torch.randn(1, 6, 3), torch.randn(1, 4, 3)
    for padding in (0.0, 9.0):
        padded = torch.cat((short, torch.full((1, 2, 3), padding)), dim=1)
        both = model(torch.cat((padded, long)), torch.tensor([4, 6]))
        assert torch.allclose(both, torch.cat((model(short), model(long))), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet_small", "vgg_small", "vit_small", "rnn", "mlp"])
def test_small_configs_fit_small_images(name: str) -> None:
    model = build(name, input_shape=[1, 28, 28], num_classes=10)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert count(model) < 1e6


def test_rotary_scores_depend_on_the_distance_only() -> None:
    rotary = Rotary(8, 32, 10_000.0)
    rotary.reset_parameters()
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 8).expand(1, 1, 32, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 32, 8)
    cos, sin = rotary.cos_sin(32)
    scores = (apply_rotary(query, cos, sin) @ apply_rotary(key, cos, sin).transpose(-1, -2))[0, 0]
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


def test_init_weights_fills_all_parameters_and_buffers() -> None:
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
        (lambda: ResNet([1, 8, 8], 2, stem="wide"), "model.stem=wide: unknown stem"),
        (lambda: ResNet([1, 8, 8], 2, depth=None), "either model.depth or model.layers"),
        (lambda: MLP([4], 2, norm="group"), "model.norm=group: unknown norm"),
        (lambda: VGG([1, 28, 28], 2), "28x28 to nothing"),
        (lambda: VGG([1, 64, 64], 2, depth=17), "model.depth=17 is not a VGG"),
        (lambda: ViT([1, 28, 28], 2), "model.patch=16 does not divide images of 28x28"),
        (lambda: RecurrentDecoder(9, cell="rnn"), "model.cell=rnn: unknown cell"),
        (lambda: Transformer(16, 8, dim=30, heads=4), "model.dim=30, model.heads=4"),
        (lambda: Transformer(16, 8, norm="batch"), "model.norm=batch: unknown norm"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
