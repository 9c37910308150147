"""Detects that `on_train_end` changed the weights, as stochastic weight averaging does: they are then saved again."""

from __future__ import annotations

import zlib

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.runtime import cpu_groups


class FinalWeights:
    """Compares checksums of the weights. `group` is the CPU (gloo) group of all ranks; None for one rank."""

    def __init__(self, group: torch.distributed.ProcessGroup | None) -> None:
        self._group = group
        self._saved: int | None = None
        """Checksum of the weights in the last checkpoint; None: no hook can change them."""

    def record(self, trainer: Trainer) -> None:
        """Record the checksum of the saved weights."""
        self._saved = _checksum(trainer.lightning_module) if _has_end_hooks(trainer) else None

    def have_changed(self, trainer: Trainer) -> bool:
        """Return whether the weights of any rank have changed since the last state was saved. Collective."""
        if self._saved is None:
            return False
        changed = torch.tensor(int(_checksum(trainer.lightning_module) != self._saved))
        if self._group is not None:
            cpu_groups.all_reduce(changed, torch.distributed.ReduceOp.MAX, self._group)
        return bool(changed)


def _has_end_hooks(trainer: Trainer) -> bool:
    """Return whether code other than this package's overrides `on_train_end`. The same on all ranks."""
    module = trainer.lightning_module
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return is_overridden("on_train_end", module, LightningModule) or any(
        is_overridden("on_train_end", callback, Callback) and not type(callback).__module__.startswith("trainer.")
        for callback in callbacks
    )


def _checksum(module: LightningModule) -> int:
    """Return a checksum of this rank's parameters and buffers."""
    checksum = 0
    for tensor in module.state_dict().values():
        if isinstance(tensor, Tensor):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            bits = local.detach().cpu().contiguous().flatten().view(torch.uint8)
            checksum = zlib.crc32(bits.numpy().data, checksum)
    return checksum
