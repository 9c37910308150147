"""One process, one device, no wrapping. Also what DDP is with one rank: its reducer would only cost."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy


def build(device: torch.device) -> SingleDeviceStrategy:
    return SingleDeviceStrategy(device)
