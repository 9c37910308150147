"""Settings of the section `trainer` that change how torch computes: what they set, and the same losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.train.in_process import attempt, fit, new_run
from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.core.errors import TrainerError
from trainer.runs.directory import RunDirectory

MODULES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningDataModule, LightningModule

class Images(LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(32, 3, 8, 8, generator=generator)
        labels = (images.mean((1, 2, 3)) > 0).long()
        return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        features = self.second(torch.relu(self.norm(self.conv(batch[0]))))
        print("channels_last", features.is_contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(self.head(features.mean((2, 3))), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)
"""
JOB = ["model._target_=modules.Net", "data._target_=modules.Images", "task=auto", "trainer.log_every_n_steps=1"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules.py").write_text(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def losses(run: RunDirectory) -> list[float]:
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_channels_last_gives_the_same_losses_also_after_a_resume(project: Path) -> None:
    plain, output = fit(project, *JOB, "trainer.max_steps=6", "name=plain")
    assert "channels_last True" not in output
    run = new_run(project, [*JOB, "trainer.max_steps=3", "trainer.channels_last=true", "name=nhwc"])
    first = attempt(run, project)
    config = run.config_path.read_text().replace("max_steps: 3", "max_steps: 6")
    run.config_path.write_text(config)
    second = attempt(run, project)
    assert first.count("channels_last True") == second.count("channels_last True") == 3
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert len(losses(run)) == 6


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_matmul_precision_is_set_in_the_rank_and_null_leaves_it(project: Path, precision: None) -> None:
    torch.set_float32_matmul_precision("highest")
    job = [*JOB, "trainer.max_steps=1"]
    fit(project, *job)
    assert torch.get_float32_matmul_precision() == "highest"
    fit(project, *job, "trainer.matmul_precision=high", "name=tf32")
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.matmul_precision=tf32"], "choose one of: high, highest, medium"),
        (["trainer.channels_last=true", "strategy=fsdp"], "use strategy=ddp, or trainer.channels_last=false"),
        (["trainer.channels_last=true", "strategy=deepspeed_zero1"], "strategy=deepspeed_zero1 flattens"),
        (["strategy=ddp", "strategy.comm_hook=bf16"], "choose one of: bf16_compress, fp16_compress, none"),
        (["resources.numa_binding=node"], "resources.numa_binding=null"),
        (["resources.numa_binding=gpu"], "choose one of: core-complex, exclusive, node, socket"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_at_the_prompt(overrides: list[str], expected: str) -> None:
    with pytest.raises(TrainerError) as refused:
        check(compose(["experiment=quickstart", "resources.gpus=0", *overrides], config_dirs=[]).config)
    assert expected in f"{refused.value}\n{refused.value.fix}"
