"""Lightning strategies, built from the options of `trainer/config/strategy.py`; one file each. `build` chooses.

To add a strategy `x`:

1. Its options: a dataclass in `config/strategy.py`, listed in `STRATEGIES`, and `conf/strategy/x.yaml`.
2. `strategies/x.py`, and its branch in `build`; also `defers`, `waits_in_forward` and `data_parallel` below. How its
   model and optimizer are saved: `saving.py`.
3. What it cannot do, so that it is refused before the launch: `config/strategy_limits.py` (pairs with precision and
   optimizer), `config/combinations.py`, `checks/config.py` (numbers of ranks). Lightning's name of it:
   `config/lightning_keys.py`.
4. Its plan: `plan/closed_form.py`, `states.py`, `collectives.py`, `simulation.py`, `job.py` (alternatives listed).
5. Others that name strategies: `train/precision.py`, `callbacks/guard.py`, `cli/bench_devices.py`.
6. Tests in `tests/strategies/`, and docs/strategies.md.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.config.strategy import (
    STRATEGIES,
    Auto,
    Ddp,
    DeepspeedZero1,
    DeepspeedZero2,
    DeepspeedZero3,
    Fsdp,
    Hsdp,
    Single,
    Tp,
    chosen_by_auto,
    ranks_in_group,
)
from trainer.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy


def build(options: Any, world_size: int, device: torch.device, timeout_s: float) -> Strategy:
    """Build the strategy that `options` describes. The process group may already exist.

    Args:
        options: An instance of one of `trainer.config.strategy.STRATEGIES`.
        world_size: Number of ranks of the job.
        device: This rank's device.
        timeout_s: Timeout of collectives.

    Raises:
        UserError: The strategy does not fit the number of ranks.
    """
    options = resolved(options, world_size, device.type)
    if type(options) is Single and world_size != 1:
        raise UserError(
            f"strategy=single runs one process, but this job has {world_size} ranks.",
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


def resolved(options: Any, world_size: int, device_type: str) -> Any:
    """Return the options of a strategy, with `auto` replaced by what it stands for."""
    if type(options) is not Auto:
        return options
    chosen = STRATEGIES[chosen_by_auto(world_size, device_type)]()
    return replace(chosen, **{one.name: getattr(options, one.name) for one in fields(Single) if one.name != "name"})


def defers(options: Any, world_size: int, device_type: str) -> bool:
    """Return whether the model may be built on the meta device (`strategies/deferred.py`)."""
    options = resolved(options, world_size, device_type)
    return isinstance(options, DeepspeedZero3) or (isinstance(options, Fsdp) and options.defer_parameters)


def waits_in_forward(options: Any, world_size: int, device_type: str) -> bool:
    """Return whether ranks wait for each other in the forward pass, because they gather parameters in it."""
    options = resolved(options, world_size, device_type)
    return isinstance(options, (Fsdp, DeepspeedZero3))


class MeshSizes(NamedTuple):
    """Sizes of the axes of the device mesh, under torch's names. Their product is the world size."""

    dp_replicate: int
    """Replicas of the model."""
    dp_shard: int
    """Ranks over which FSDP shards one replica."""
    tp: int
    """Ranks that share each layer by tensor parallelism."""


def mesh_sizes(options: Fsdp, world_size: int) -> MeshSizes:
    """Return the sizes of the device mesh.

    Raises:
        UserError: `strategy.shard_size` or `strategy.tensor_parallel_size` does not divide the number of ranks.
    """
    size = ranks_in_group(vars(options), world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    if isinstance(options, Tp):
        return MeshSizes(1, world_size // size, size)
    return MeshSizes(world_size // size, size, 1) if isinstance(options, Hsdp) else MeshSizes(1, world_size, 1)


def data_parallel(options: Any, rank: int, world_size: int) -> tuple[int, int]:
    """Return the data parallel rank and the number of data parallel ranks, which read different samples.

    They differ from rank and world size only with tensor parallelism.
    """
    tp = mesh_sizes(options, world_size).tp if isinstance(options, Tp) else 1
    return rank // tp, world_size // tp
