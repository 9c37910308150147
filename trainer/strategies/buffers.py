"""Buffers that are replicated on every rank. Rank 0's copy is authoritative, as in DDP."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as _Base
else:
    _Base = object

_NORMALIZING = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""Layers that use batch or instance statistics in training, and only write their buffers, the running statistics.

Exact types: a subclass may read its buffers in training. Lazy layers are already materialized here.
"""
_TRAINING = attrgetter("training")


class BuffersOfRank0(_Base):
    """Mixin for a strategy that does not synchronize buffers in training: broadcasts them before an evaluation."""

    def on_validation_start(self) -> None:
        """Broadcast the buffers of rank 0."""
        super().on_validation_start()
        self._copy_buffers()

    def on_test_start(self) -> None:
        """Broadcast the buffers of rank 0."""
        super().on_test_start()
        self._copy_buffers()

    def on_predict_start(self) -> None:
        """Broadcast the buffers of rank 0."""
        super().on_predict_start()
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        assert self.model is not None
        if dist.get_world_size() > 1:
            for buffer in self.model.buffers():
                if not isinstance(buffer, DTensor):
                    dist.broadcast(buffer, src=0)


class DDPWithLazyBufferBroadcast(DistributedDataParallel):
    """DDP that broadcasts buffers only when a forward pass may read them.

    torch broadcasts every buffer of rank 0 before each forward pass. That is a collective, in which the ranks wait for
    each other, and a walk through all modules in Python: 5% of the step for a small ResNet on two CPU ranks. In
    training a normalization layer does not read its buffers, and rank 0's values, which are saved, are the same without
    the broadcast. `BuffersOfRank0` broadcasts them before an evaluation reads them.

    The buffers are still broadcast if a normalization layer is frozen (`eval()`) when the forward pass begins, or if
    the model has any other buffer. With `only_evaluation` they are never broadcast in training.
    """

    def __init__(self, module: nn.Module, *, only_evaluation: bool = False, **options: Any) -> None:
        super().__init__(module, **options)
        self._only_evaluation = only_evaluation
        self._normalizing = [one for one in self.module.modules() if type(one) in _NORMALIZING]
        statistics = sum(len(list(one.buffers(recurse=False))) for one in self._normalizing)
        self._only_statistics = statistics == len(list(self.module.buffers()))

    def will_sync_module_buffers(self) -> bool:
        """Return whether torch broadcasts the buffers before this forward pass."""
        if self._only_evaluation or not torch.is_grad_enabled():  # an evaluation, before which they are broadcast
            return False
        if self._only_statistics and all(map(_TRAINING, self._normalizing)):
            return False
        return bool(super().will_sync_module_buffers())  # type: ignore[no-untyped-call]
