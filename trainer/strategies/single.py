"""One process, one device, no wrapping.

strategy=ddp with one rank uses this, too: DDP's reducer would only cost time.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from trainer.config.strategy import Single
from trainer.runtime.clipping import report_clipping
from trainer.strategies.blocks import prepare
from trainer.strategies.saving import WholeCheckpoints


class RunSingleStrategy(WholeCheckpoints, SingleDeviceStrategy):
    """Lightning's SingleDeviceStrategy with our checkpoints."""

    def __init__(self, options: Single, device: torch.device) -> None:
        super().__init__(device)
        self.options = options

    def setup(self, trainer: Trainer) -> None:
        """Apply activation checkpointing and compilation, then set up as Lightning does."""
        assert self.model is not None
        prepare(self.model, self.options)
        report_clipping(self.precision_plugin)
        super().setup(trainer)


def build(options: Single, device: torch.device) -> RunSingleStrategy:
    """Build the strategy for this process's `device`."""
    return RunSingleStrategy(options, device)
