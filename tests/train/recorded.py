"""A small module and data module that write down what a Trainer does with them, whoever made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EVENTS: list[tuple[Any, ...]] = []
"""Of the Trainer at work; empty it before the next."""
SAMPLES, BATCH = 48, 4
STOP: list[tuple[int, Path]] = []
"""A step after which `Plain` asks its run to stop, and the file that asks."""


class Net(LightningModule):
    """Starts from the same weights every time, so that trainings can be compared."""

    def __init__(self, lr: float = 0.1, learns: bool = True) -> None:
        super().__init__()
        self.lr, self.learns = lr, learns
        self.net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.5, generator=generator)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        EVENTS.append(("train", self.current_epoch, batch_idx, round(float(batch[0].sum()), 4)))
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        mode = "inference" if torch.is_inference_mode_enabled() else "no_grad"
        EVENTS.append(("sanity" if self.trainer.sanity_checking else "val", self.global_step, batch_idx, mode))
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean() if self.learns else 1.0)

    def on_train_epoch_end(self) -> None:
        EVENTS.append(("epoch", self.current_epoch, self.global_step))

    def on_fit_end(self) -> None:
        trainer = self.trainer
        EVENTS.append(("end", trainer.current_epoch, trainer.global_step, type(trainer.profiler).__name__))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Plain(Net):
    """Without an optimizer of its own: the configuration's."""

    configure_optimizers = LightningModule.configure_optimizers

    def on_train_batch_end(self, *_: Any) -> None:
        EVENTS.append(("lr", self.global_step, self.optimizers().param_groups[0]["lr"]))  # type: ignore[union-attr]
        if STOP and self.global_step == STOP[0][0]:
            STOP.pop()[1].touch()


class Rows(LightningDataModule):
    """Not shuffled: the order of the samples is Lightning's, too. Notes the epochs for which loaders are asked."""

    def __init__(self, samples: int = SAMPLES, shuffle: bool = False) -> None:
        super().__init__()
        self.samples, self.shuffle = samples, shuffle

    def _loader(self, samples: int, shuffle: bool = False) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(samples, 4, generator=generator)
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), BATCH, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.samples, self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.samples // 2)

    test_dataloader = val_dataloader
