"""Buffers of a model that every rank has whole: rank 0's are the model's, as in DDP."""

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
"""In training these normalize by their batch, and only write the running statistics that their buffers are. What is
derived from them may read those, and what is lazy has become one of them."""
_TRAINING = attrgetter("training")


class BuffersOfRank0(_Base):
    """For a strategy that leaves buffers alone in training: copied before the model is evaluated, on all ranks."""

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._copy_buffers()

    def on_test_start(self) -> None:
        super().on_test_start()
        self._copy_buffers()

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        assert self.model is not None
        if dist.get_world_size() > 1:
            for buffer in self.model.buffers():
                if not isinstance(buffer, DTensor):
                    dist.broadcast(buffer, src=0)


class DDPWithQuietBuffers(DistributedDataParallel):
    """DDP that leaves buffers alone while nobody reads those of the other ranks.

    torch sends every buffer of rank 0 to the others before each forward pass: a collective, at which the ranks wait for
    each other, and a walk through all modules in Python (of a small ResNet on two CPU ranks 5% of the step). In
    training a normalization layer reads none of them; what rank 0 has, and so what is saved, is the same without it.
    `BuffersOfRank0` copies them before they are read.

    A layer that is frozen (`eval()`) when the forward pass begins, and any other buffer, are sent as ever; with
    `always_quiet` these are not.
    """

    def __init__(self, module: nn.Module, *, always_quiet: bool = False, **options: Any) -> None:
        super().__init__(module, **options)
        self._always_quiet = always_quiet
        self._normalizing = [one for one in self.module.modules() if type(one) in _NORMALIZING]
        statistics = sum(len(list(one.buffers(recurse=False))) for one in self._normalizing)
        self._only_statistics = statistics == len(list(self.module.buffers()))

    def will_sync_module_buffers(self) -> bool:
        if self._always_quiet or not torch.is_grad_enabled():  # without gradients it is evaluated: they are copied
            return False
        if self._only_statistics and all(map(_TRAINING, self._normalizing)):
            return False
        return bool(super().will_sync_module_buffers())
