"""The job of `benchmarks/host_reads`: a module, its data, and the callback that counts."""

from __future__ import annotations

from typing import Any

import torch
from host_reads_count import HostReads
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

FIRST, LAST, LOG_EVERY = 22, 29, 10
"""Steps that are counted: none of them is logged, and what only the first steps do is done."""
SAMPLES, WIDTH, CLASSES = 640, 16, 4


class Reads(Callback):
    """Counts in the steps `FIRST` to `LAST`."""

    read_only = True
    reads: HostReads

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell what is on the device."""
        self.reads.put_on_device(batch)
        self.reads.put_on_device([*pl_module.parameters(), *pl_module.buffers()])
        for part in pl_module.modules():
            self.reads.put_on_device(one for name in getattr(part, "_defaults", ()) for one in [getattr(part, name)])
        for optimizer in trainer.optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's wrapper has it
            for state in inner.state.values():
                step = state.get("step")
                if isinstance(step, torch.Tensor):  # torch keeps it on the host, unless the optimizer is fused
                    self.reads.take_off_device(step)
                self.reads.put_on_device(one for one in state.values() if isinstance(one, torch.Tensor) and one.dim())
        if FIRST <= trainer.global_step + 1 <= LAST:
            self.reads.start()
        else:
            self.reads.stop()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gradients, which FSDP makes outside of what a dispatch mode sees, are on the device, too."""
        self.reads.put_on_device(one.grad for one in pl_module.parameters() if one.grad is not None)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.down(torch.relu(self.up(features)))


class Net(nn.Module):
    """Blocks that every strategy can shard."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def blocks(self) -> list[nn.Module]:
        return list(self.body)

    def tensor_parallel(self) -> dict[str, str]:
        return {"body.*.up": "column", "body.*.down": "row"}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for block in self.body:
            features = block(features)
        return self.head(features)


class Task(LightningModule):
    """A module of a user, which logs a tensor and a metric object at every step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.accuracy = MulticlassAccuracy(CLASSES, validate_args=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        outputs = self.model(batch[0].to(self.model.head.weight.dtype)).float()
        loss = functional.cross_entropy(outputs, batch[1])
        self.accuracy(outputs, batch[1])
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss


class Data(LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
        self.samples = TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))
        self.size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=self.size)
