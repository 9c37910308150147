"""From the options of `trainer/config/strategy.py` to Lightning strategies; one small file each."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.config.strategy import (
    Auto,
    Ddp,
    DeepspeedZero1,
    DeepspeedZero2,
    DeepspeedZero3,
    Fsdp,
    Hsdp,
    Single,
    Tp,
    ranks_in_group,
)
from trainer.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy


def build(options: Any, world_size: int, device: torch.device, timeout_s: float) -> Strategy:
    """The strategy that `options` (an instance of one of `trainer.config.strategy.STRATEGIES`) describes.

    `device` is this rank's own; `timeout_s` is how long a collective may take. The process group may already exist.
    Raises UserError where the strategy does not go with the number of ranks or the device.
    """
    if type(options) is Auto:
        options = chosen_by_auto(options, world_size, device.type)
    if type(options) is Single and world_size != 1:
        raise UserError(
            f"strategy=single runs one process; this job has {world_size} ranks.",
            "Use strategy=ddp, or resources.gpus=1 (on CPU resources.cpu_processes=1).",
        )
    if type(options) is Single or (type(options) is Ddp and world_size == 1):
        from trainer.strategies import single

        return single.build(options, device)
    if type(options) is Ddp:
        from trainer.strategies import ddp

        return ddp.build(options, device, timeout_s)
    if isinstance(options, (DeepspeedZero1, DeepspeedZero2, DeepspeedZero3)):
        from trainer.strategies import deepspeed_zero

        return deepspeed_zero.build(options, device, timeout_s)
    assert isinstance(options, Fsdp), options
    from trainer.strategies import fsdp

    return fsdp.build(options, mesh_sizes(options, world_size), device, timeout_s)


def chosen_by_auto(options: Auto, world_size: int, device_type: str) -> Single:
    """The documented rule until there is a planner: one rank: single; GPUs: fsdp; CPU: ddp."""
    chosen = Single() if world_size == 1 else Fsdp() if device_type == "cuda" else Ddp()
    return replace(chosen, activation_checkpointing=options.activation_checkpointing, compile=options.compile)


def defers(options: Any, world_size: int, device_type: str) -> bool:
    """Whether the model may be built without memory for its parameters (`strategies/deferred.py`)."""
    if type(options) is Auto:
        options = chosen_by_auto(options, world_size, device_type)
    return isinstance(options, Fsdp) and options.defer_parameters


def waits_in_forward(options: Any, world_size: int, device_type: str) -> bool:
    """Whether the ranks gather parameters inside of the forward pass, and so wait for each other there."""
    if type(options) is Auto:
        options = chosen_by_auto(options, world_size, device_type)
    return isinstance(options, (Fsdp, DeepspeedZero3))


def mesh_sizes(options: Fsdp, world_size: int) -> tuple[int, int, int]:
    """Copies, shards in a copy, ranks that share a layer; their product is `world_size`.

    Raises UserError if the option does not divide the ranks.
    """
    size = ranks_in_group(vars(options), world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    if isinstance(options, Tp):
        return 1, world_size // size, size
    return (world_size // size, size, 1) if isinstance(options, Hsdp) else (1, world_size, 1)


def data_parallel(options: Any, rank: int, world_size: int) -> tuple[int, int]:
    """This rank among those that read different samples, and their number: less than all only with tensor parallel."""
    tensor = mesh_sizes(options, world_size)[2] if isinstance(options, Tp) else 1
    return rank // tensor, world_size // tensor
