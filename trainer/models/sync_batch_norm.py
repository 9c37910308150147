"""Batch normalisation over the batches of all ranks, as on one device with the joint batch.

torch's own `nn.SyncBatchNorm` runs on GPUs only; this one runs wherever collectives do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """Sum over all ranks, with a gradient.

    Every rank's loss depends on the sum, so the gradient of each rank's part is the sum of all gradients.
    """

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation of `(batch, channels, ...)` over all ranks, like `nn.BatchNorm1d` to `nn.BatchNorm3d`.

    Source: Ioffe and Szegedy 2015. The ranks' batches may differ in size. A forward pass takes two reductions: the
    variance as mean of squares minus square of the mean would save one, but lose the digits that matter.
    """

    def _check_input_dim(self, inputs: Tensor) -> None:
        if inputs.dim() < 2:
            raise ValueError(f"batch normalisation needs (batch, channels, ...), got {inputs.dim()} dimensions")

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise `(batch, channels, ...)` and update the running statistics in training."""
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(inputs)
        self._check_input_dim(inputs)
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        shape = [1, -1, *[1] * (inputs.dim() - 2)]
        values = inputs.float()
        local = values.new_tensor([values.numel() / values.shape[1]])
        sums = _SumOverRanks.apply(torch.cat((values.sum(axes), local)))  # type: ignore[no-untyped-call]
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centred = values - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count  # type: ignore[no-untyped-call]
        self._track(mean.detach(), variance.detach() * count.detach() / (count.detach() - 1))
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        output: Tensor = normalised.to(inputs.dtype)
        return output

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def convert_sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace each batch normalisation of `model` by a synchronised one, with the same parameters and buffers.

    On a GPU it is torch's `nn.SyncBatchNorm`.
    """
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            converted = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            converted.__dict__.update({key: child.__dict__[key] for key in ("_parameters", "_buffers", "training")})
            setattr(model, name, converted)
        else:
            convert_sync_batch_norm(child, device)
    return model
