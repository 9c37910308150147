"""One process, one device, no wrapping. Also what DDP is with one rank: its reducer would only cost."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from trainer.config.strategy import Single
from trainer.strategies.blocks import prepare
from trainer.strategies.saving import WholeCheckpoints


class RunSingleStrategy(WholeCheckpoints, SingleDeviceStrategy):
    def __init__(self, options: Single, device: torch.device) -> None:
        super().__init__(device)
        self.options = options

    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        prepare(self.model, self.options)
        super().setup(trainer)


def build(options: Single, device: torch.device) -> RunSingleStrategy:
    return RunSingleStrategy(options, device)
