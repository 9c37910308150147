"""A LightningModule whose initialization torch's sequential generators, hooks and its own code determine."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, LAYERS = 520, 12


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(8, WIDTH)), batch_size=self.batch_size)


class Layer(nn.Module):
    """The weight is more than 1 MiB, the size above which one rank keeps it for all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "computed":
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        else:
            self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))
            {"orthogonal": nn.init.orthogonal_, "sequential": nn.init.xavier_normal_}[kind](self.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


class Own(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(Layer(kind) for kind in ("computed", "orthogonal", "sequential") * (LAYERS // 4))

    def setup(self, stage: str) -> None:
        if len(self.body) < LAYERS:
            self.body.extend(Layer("sequential") for _ in range(LAYERS // 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = batch[0]
        for layer in self.body:
            features = layer(features)
        return features.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-9)
