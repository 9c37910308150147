"""`trainer.float8` on CPU, where torchao emulates the products: near the losses without it, and off in evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from tests.train.in_process import attempt, fit, new_run
from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.core.errors import TrainerError, UserError
from trainer.models.transformer import Transformer
from trainer.runs.directory import RunDirectory
from trainer.train.float8 import convert

CPU = torch.device("cpu")
MODULES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningDataModule, LightningModule
from trainer.models.transformer import Transformer

class Tokens(LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        starts = torch.randint(0, 32, (64, 1), generator=generator)
        return DataLoader(TensorDataset((starts + torch.arange(17)) % 32), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(34).reshape(2, 17) % 32), batch_size=2)

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Transformer(32, 16, dim=32, layers=2, heads=2)

    def loss(self, batch):
        logits = self.net(batch[0][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))
        print("float8", [type(part).__name__ for part in self.modules()].count("Float8InTraining"))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)
"""
JOB = ["model._target_=modules.Net", "data._target_=modules.Tokens", "task=auto", "data.batch_size=8"]
JOB += ["trainer.log_every_n_steps=1", "trainer.max_epochs=null"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("torchao")
    (tmp_path / "modules.py").write_text(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def losses(run: RunDirectory, name: str = "train/loss") -> list[float]:
    lines = map(json.loads, run.metrics_path.read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.fixture
def plain(project: Path) -> list[float]:
    return losses(fit(project, *JOB, "trainer.max_steps=20", "name=plain")[0])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_losses_are_near_those_without_it_and_a_resume_continues(
    project: Path, plain: list[float], recipe: str
) -> None:
    more = [f"trainer.float8={recipe}", "strategy.activation_checkpointing=selective"]
    run = new_run(project, [*JOB, "trainer.max_steps=8", *more, "name=float8"])
    output = attempt(run, project)
    assert "float8 14" in output  # per block query, key, value, out, gate, up and down; not the head
    run.config_path.write_text(run.config_path.read_text().replace("max_steps: 8", "max_steps: 20"))
    attempt(run, project)
    found = losses(run)
    assert len(found) == len(plain) == 20
    differences = [abs(one - other) / other for one, other in zip(found, plain, strict=True)]
    assert 0 < differences[0] < 2e-3
    assert max(differences) < 2e-2
    assert found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_it_is_off_in_evaluation_and_leaves_names_and_parameters(recipe: str) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net = Transformer(32, 16, dim=32, layers=2, heads=2)
    tokens, before = torch.randint(0, 32, (2, 16)), dict(net.named_parameters())
    in_training, evaluated = net(tokens), net.eval()(tokens)
    assert convert(net, recipe, CPU) == 14
    assert torch.equal(net(tokens), evaluated)
    quantized = net.train()(tokens)
    assert not torch.equal(quantized, in_training)
    torch.testing.assert_close(quantized, in_training, rtol=0.1, atol=0.1)
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_an_evaluation_needs_neither_float8_nor_torchao() -> None:
    net = nn.Linear(3, 3)
    with mock.patch.dict("sys.modules", {"torchao": None, "torchao.float8": None}):
        assert convert(net, "none", CPU) == 0
        with pytest.raises(UserError, match="needs the package torchao") as refused:
            convert(net, "tensorwise", CPU)
    assert "pip install" in refused.value.fix


def test_a_gpu_without_float8_and_a_model_without_layers_are_named() -> None:
    pytest.importorskip("torchao")
    with (
        mock.patch.multiple(
            "torch.cuda",
            get_device_capability=lambda device: (8, 0),
            get_device_name=lambda device: "NVIDIA A100",
        ),
        pytest.raises(UserError, match="NVIDIA A100 has no float8"),
    ):
        convert(nn.Linear(16, 16), "rowwise", torch.device("cuda", 0))
    uneven = nn.Sequential(*(nn.Sequential(nn.Linear(20, 20)) for _ in range(2)))
    with pytest.raises(UserError, match="multiples of 16"):
        convert(uneven, "tensorwise", CPU)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.precision=32-true"], "use bf16-mixed"),
        (["trainer.precision=16-mixed"], "use bf16-mixed"),
        (["strategy=deepspeed_zero2"], "use strategy=fsdp"),
        (["strategy=tp"], "use strategy=fsdp"),
        (["finetune.lora_rank=4"], "LoRA replaces the same layers"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused_at_the_prompt(overrides: list[str], expected: str) -> None:
    given = ["experiment=quickstart", "resources.gpus=0", "trainer.float8=rowwise", *overrides]
    with pytest.raises(TrainerError) as refused:
        check(compose(given, config_dirs=[]).config)
    assert expected in f"{refused.value}\n{refused.value.fix}"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_gpu_multiplies_in_float8_near_bf16(recipe: str) -> None:
    pytest.importorskip("torchao")
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("no float8 tensor cores")
    torch.manual_seed(0)
    net = Transformer(64, 32, dim=64, layers=2, heads=2).to(device)
    tokens = torch.randint(0, 64, (4, 32), device=device)
    with torch.autocast("cuda", torch.bfloat16):
        expected = net(tokens)
        assert convert(net, recipe, device) == 14
        found = net(tokens)
    found.float().square().mean().backward()
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    gradients = [parameter.grad for parameter in net.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
