"""MFU from numbers that were computed by hand, and when there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from trainer.config.schema import Config, Resources, TrainerOptions
from trainer.core.paths import conf_dir
from trainer.models import hf
from trainer.models.resnet import ResNet
from trainer.models.transformer import Transformer
from trainer.runtime.process import Rank
from trainer.tasks.classification import Classification
from trainer.tasks.language_modelling import LanguageModelling
from trainer.train import flops


def transformer(name: str) -> Transformer:
    node = yaml.safe_load((Path(conf_dir()) / "model" / f"{name}.yaml").read_text())
    del node["_target_"]
    with torch.device("meta"):
        return Transformer(**node)


def test_gpt2_has_the_flops_of_its_formula() -> None:
    counted = 124_439_808 - 1024 * 768  # tied: the embedding is the output layer
    assert transformer("gpt2_124m").flops_per_token(1024) == 6 * counted + 12 * 12 * 768 * 1024 == 855_166_464


def test_llama_does_not_count_the_embedding_that_is_only_looked_up() -> None:
    counted = 8_030_261_248 - 128_256 * 4096
    assert transformer("llama3_8b").flops_per_token(4096) == 6 * counted + 12 * 32 * 4096 * 4096 == 51_471_998_976


class FromTransformers(nn.Module):
    """The parts of a model of `transformers` that are read."""

    def __init__(self, tied: bool, **settings: Any) -> None:
        super().__init__()
        known = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 3}
        self.config = SimpleNamespace(**known | settings)
        self.embedding, self.body, self.head = nn.Embedding(100, 32), nn.Linear(32, 32), nn.Linear(32, 100, False)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize(
    ("tied", "settings", "expected"),
    [
        (True, {}, 6 * (3200 + 1056) + 12 * 3 * 32 * 64),
        (False, {}, 6 * (3200 + 1056) + 12 * 3 * 32 * 64),
        (True, {"head_dim": 16}, 6 * (3200 + 1056) + 12 * 3 * 64 * 64),
        (True, {"model_type": "qwen2", "use_sliding_window": True}, None),
        (True, {"model_type": "mixtral"}, None),
    ],
)
def test_plain_decoders_of_transformers(tied: bool, settings: dict[str, Any], expected: int | None) -> None:
    assert hf.flops_per_token(FromTransformers(tied, **settings), 64) == expected


class Shard(nn.Parameter):
    """As under ZeRO-3: no elements here."""

    ds_numel = 7


def test_shards_count_as_whole_parameters() -> None:
    model = Transformer(16, 8, dim=8, layers=1, heads=2, positions="learned")
    whole = model.flops_per_token(8)
    model.norm.weight = Shard(torch.empty(0))
    assert model.flops_per_token(8) == whole - 6 * 1  # 7 of 8


def test_a_convolution_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.out(self.norm(self.conv(images)).mean((2, 3)))
            return features

    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert flops.forward_flops(net, [torch.empty(1, 3, 8, 8)]) == 2 * 64 * 4 * 27 + 2 * 4 * 5
    assert all(part.training for part in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def config(**node: Any) -> Config:
    return Config(model=node, resources=Resources(gpus=2), trainer=TrainerOptions(max_steps=1, precision="bf16-mixed"))


def set_mfu(monkeypatch: pytest.MonkeyPatch, device: str, module: Any, facts: dict[str, Any]) -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    metrics: Any = SimpleNamespace(peak_s_per_sample=None)
    node = {"_target_": f"{type(module.model).__module__}.{type(module.model).__name__}"}
    flops.set_mfu(metrics, module, config(**node), Rank(0, 0, 2, 2, 0), facts)
    found: float | None = metrics.peak_s_per_sample
    return found


def test_the_seconds_of_a_sample_at_the_peak_of_two_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = LanguageModelling(transformer("gpt2_124m"))
    found = set_mfu(monkeypatch, "NVIDIA H200", module, {"sequence_length": 1024})
    assert found == pytest.approx(855_166_464 * 1024 / (2 * 989.5e12))
    line = "MFU: 6 N + 12 L d T = 0.8552 GFLOP per token, peak 989.5 TFLOP/s (NVIDIA H200, bf16)\n"
    assert capsys.readouterr().out == line


def test_images_count_three_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ResNet((3, 32, 32), 10)
    found = set_mfu(monkeypatch, "NVIDIA A100-SXM4-80GB", Classification(network), {"input_shape": (3, 32, 32)})
    once = flops.forward_flops(network, [torch.empty(1, 3, 32, 32)])
    assert found == pytest.approx(3 * once / (2 * 312e12))


@pytest.mark.parametrize("why", ["device", "frozen", "users"])
def test_no_mfu_is_better_than_a_guess(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    network: Any = transformer("gpt2_124m")
    if why == "frozen":
        network.norm.weight.requires_grad_(False)
    if why == "users":
        network = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    name = "NVIDIA Future 1" if why == "device" else "NVIDIA H200"
    assert set_mfu(monkeypatch, name, LanguageModelling(network), {"sequence_length": 1024}) is None
    reason = {
        "device": "no MFU: the peak rate of 'NVIDIA Future 1' in bf16 is not in the hardware catalogue",
        "frozen": "no MFU: some parameters are frozen",
        "users": "no MFU: the FLOPs of Sequential are not known (a method flops_per_token would return them)",
    }[why]
    assert capsys.readouterr().out.strip() == reason
