"""The end of a training copies nothing to the host, under any strategy, and waits for the checkpoint writer first."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn

from trainer import strategies
from trainer.checkpoint import io as checkpoint_io
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore
from trainer.config.strategy import STRATEGIES

NAMES = ("single", "ddp", "fsdp", "tp", "deepspeed_zero1", "deepspeed_zero3")


class OnMeta(LightningModule):
    """Parameters without data: a copy to the host, as Lightning makes it, raises NotImplementedError."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, device="meta")


class Watched(CPUAccelerator):
    """Records whether a checkpoint was still being written when it is torn down."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self.writer, self.in_flight = writer, list[bool]()

    def teardown(self) -> None:
        self.in_flight.append(self.writer.in_flight)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_copied_and_the_writer_has_finished(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = STRATEGIES[name]()
    strategy: Any = strategies.build(options, 1 if name == "single" else 2, torch.device("cpu"), 60.0)
    module = OnMeta()
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.state[module.layer.weight]["exp_avg"] = torch.zeros(4, 4, device="meta")
    writer = CheckpointWriter(CheckpointStore(tmp_path / "checkpoints"))
    strategy.accelerator = accelerator = Watched(writer)
    strategy.cluster_environment = LightningEnvironment()
    strategy.checkpoint_io = RunCheckpointIO(writer)
    strategy.connect(module)
    strategy.optimizers = [optimizer]

    original, slow = checkpoint_io.write_state, threading.Event()

    def write(staging: Any, state: dict[str, Any]) -> None:
        slow.wait(0.2)
        original(staging, state)

    monkeypatch.setattr(checkpoint_io, "write_state", write)
    writer.save({"a": torch.ones(1)}, tmp_path / "checkpoints" / "step-00000001", CommitInfo(step=1))
    assert writer.in_flight
    strategy.teardown()
    assert accelerator.in_flight == [False]
    assert strategy.model is strategy.lightning_module is module
    assert strategy.optimizers == [optimizer]
    assert module.layer.weight.is_meta


class Exports(LightningModule):
    """Calls itself at the end, on the CPU, where Lightning has put it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.moves = 0

    def cpu(self) -> Any:
        self.moves += 1
        return super().cpu()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fails_at:
            raise ValueError("no")
        return self.layer(batch).mean()

    fails_at = -1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 4), 4)


class WithHook(Exports):
    def on_fit_end(self) -> None:
        assert self.moves == 1


class Hook(Callback):
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert pl_module.moves == 1


class Fails(WithHook):
    fails_at = 1


@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:The `srun` command")
@pytest.mark.parametrize(
    ("kind", "callbacks", "moves"), [(Exports, [], 0), (Exports, [Hook()], 1), (WithHook, [], 1), (Fails, [], 0)]
)
def test_a_users_on_fit_end_finds_the_model_on_the_cpu_as_in_lightning(
    kind: type[Exports], callbacks: list[Callback], moves: int
) -> None:
    options: Any = STRATEGIES["single"]()
    strategy: Any = strategies.build(options, 1, torch.device("cpu"), 60.0)
    module = kind()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        callbacks=callbacks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match="no") if kind is Fails else nullcontext():
        trainer.fit(module)
    assert module.moves == moves
