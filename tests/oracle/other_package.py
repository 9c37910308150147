"""A module, data and a callback of the package `pytorch_lightning`, which is Lightning under its older name."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional

from tests.oracle.data import Rows
from tests.oracle.modules import network


class OlderName(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class OlderData(pl.LightningDataModule):
    width = 12

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Rows(48, 1), batch_size=8)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Rows(16, 2), batch_size=8)


class OlderCallback(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            pl_module.net[0].bias.add_(0.01)
