"""From the options of `trainer/config/strategy.py` to Lightning strategies; one small file each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config.strategy import Ddp, Single
from trainer.errors import UserError

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy


def build(options: Any, world_size: int, device: torch.device, timeout_s: float) -> Strategy:
    """The strategy that `options` (an instance of one of `trainer.config.strategy.STRATEGIES`) describes.

    `device` is this rank's own; `timeout_s` is how long a collective may take. The process group may already exist.
    Raises UserError where the strategy does not go with the number of ranks or the device.
    """
    if isinstance(options, Single) or (isinstance(options, Ddp) and world_size == 1):
        if world_size != 1:
            raise UserError(
                f"strategy=single runs one process; this job has {world_size} ranks.",
                "Use strategy=ddp, or resources.gpus=1 (on CPU resources.cpu_processes=1).",
            )
        from trainer.strategies import single

        return single.build(device)
    from trainer.strategies import ddp

    return ddp.build(options, device, timeout_s)
