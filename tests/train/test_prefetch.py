"""`trainer.prefetch_to_device`: the same training with a batch ahead, on a stream that a test stands in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.train.in_process import attempt, fit, new_run, weights
from trainer.train.loop import LeanTrainingEpochLoop
from trainer.train.prefetch import CopyStream

MODULES = '''
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from lightning.pytorch import LightningDataModule, LightningModule

class Noisy(Dataset):
    """Random numbers in a sample, which resume exactly because they are seeded by the sample."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": torch.full((6,), float(index)) / 40 + 0.1 * torch.rand(6), "name": str(index)}

class Numbers(LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()

    def train_dataloader(self):
        return DataLoader(Noisy(), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Noisy(), batch_size=8)

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        print("micro-batch", batch_idx, *sorted(batch["name"]))
        return self.layers(batch["x"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layers(batch["x"]).square().mean(), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)

class Moves(Numbers):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch
'''
JOB = ["data._target_=modules.Numbers", "task=auto", "data.batch_size=8", "data.micro_batch=4"]
JOB += ["trainer.max_epochs=null", "trainer.log_every_n_steps=1", "trainer.val_check_interval=3"]


class OnTheHost:
    """In place of the CUDA stream. A copy is not there before the stream that computes has waited for it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.started: list[torch.Tensor] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        self.events.append("copy")
        self.started.append(tensor.clone())
        hidden = torch.full_like(tensor, float("nan"))
        self.hidden = [*getattr(self, "hidden", []), (hidden, tensor)]
        return hidden

    def wait(self) -> None:
        self.events.append("wait")
        for copy, tensor in getattr(self, "hidden", []):
            copy.copy_(tensor)
        self.hidden = []

    def keep(self, tensor: torch.Tensor) -> None:
        self.events.append("keep")
        assert not tensor.isnan().any()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules.py").write_text(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> OnTheHost:
    stream = OnTheHost()
    monkeypatch.setattr(LeanTrainingEpochLoop, "copy_stream", stream)
    return stream


def steps(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("micro-batch ")]


def test_a_batch_ahead_changes_no_bit_also_after_resumes_within_an_epoch(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch is five steps of two micro-batches; the attempts end within the first, the second and the third."""
    plain, expected = fit(project, "model._target_=modules.Net", *JOB, "trainer.max_steps=12", "name=plain")
    stream = OnTheHost()
    monkeypatch.setattr(LeanTrainingEpochLoop, "copy_stream", stream)
    run = new_run(project, ["model._target_=modules.Net", *JOB, "trainer.max_steps=2", "name=ahead"])
    seen = steps(attempt(run, project))
    for before, after in ((2, 7), (7, 12)):
        config = run.config_path.read_text()
        run.config_path.write_text(config.replace(f"max_steps: {before}\n", f"max_steps: {after}\n"))
        seen += steps(attempt(run, project))
    assert len(stream.started) > 24  # and one that was ahead at the end of an attempt
    assert seen == steps(expected)
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(run)[name]), name


def test_the_next_batch_is_copied_before_a_step_and_waited_for_after_it(project: Path, stream: OnTheHost) -> None:
    fit(project, "model._target_=modules.Net", *JOB, "trainer.max_steps=2")
    first, second = ["copy", "wait", "keep", "copy"], ["wait", "keep", "copy"]
    assert stream.events == [*first, *second * 3]


def test_an_epoch_is_not_read_beyond_its_end(project: Path, stream: OnTheHost) -> None:
    _, output = fit(project, "model._target_=modules.Net", *JOB, "trainer.max_steps=10")
    assert len(steps(output)) == 20
    assert len(stream.started) == 20  # ten in each of two epochs


@pytest.mark.parametrize("more", [["data._target_=modules.Moves"], ["trainer.lean_loop=false"]])
def test_hooks_that_move_batches_and_lightnings_loop_are_left_alone(
    project: Path, stream: OnTheHost, more: list[str]
) -> None:
    fit(project, "model._target_=modules.Net", *JOB, "trainer.max_steps=2", *more)
    assert stream.events == []


def test_there_is_no_stream_on_a_cpu(project: Path) -> None:
    with mock.patch("torch.cuda.Stream") as made:
        fit(project, "model._target_=modules.Net", *JOB, "trainer.max_steps=1")
    made.assert_not_called()


def test_the_stream_copies_from_pinned_memory_without_blocking() -> None:
    pageable, pinned, there = mock.MagicMock(), mock.MagicMock(), mock.MagicMock()
    pageable.device.type = pinned.device.type = "cpu"
    there.device.type = "cuda"
    pageable.is_pinned.return_value, pinned.is_pinned.return_value = False, True
    device = torch.device("cuda", 0)
    with mock.patch.multiple(
        "torch.cuda", Stream=mock.DEFAULT, stream=mock.DEFAULT, current_stream=mock.DEFAULT
    ) as cuda:
        stream = CopyStream(device)
        assert stream.copy(pinned) is pinned.to.return_value
        pinned.to.assert_called_once_with(device, non_blocking=True)
        assert stream.copy(pageable) is pageable.pin_memory.return_value.to.return_value
        assert stream.copy(there) is there
        cuda["stream"].assert_called_with(cuda["Stream"].return_value)
        stream.wait()
        cuda["current_stream"].return_value.wait_stream.assert_called_once_with(cuda["Stream"].return_value)
        stream.keep(there)
        there.record_stream.assert_called_once_with(cuda["current_stream"].return_value)


@pytest.mark.gpu
def test_on_a_gpu_a_batch_ahead_changes_no_bit(project: Path) -> None:
    job: list[Any] = ["model._target_=modules.Net", *JOB, "trainer.max_steps=12", "resources.gpus=1", "strategy=single"]
    runs = [fit(project, *job, f"trainer.prefetch_to_device={on}", f"name=run-{on}")[0] for on in ("true", "false")]
    expected, found = map(weights, runs)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
