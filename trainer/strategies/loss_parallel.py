"""An output layer whose vocabulary is split over the ranks of tensor parallelism (`strategy.loss_parallel`).

Each rank computes the logits of its part of the vocabulary. The cross entropy needs of the other ranks only the
maximum, the sum of the exponentials and the logit of the target at each position (Shoeybi et al. 2019, Megatron-LM,
https://arxiv.org/abs/1909.08053, section 3). No rank has all logits, nor all weights of the layer or their gradients.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.models.linear_cross_entropy import IGNORED, Losses, LossHead, rows_of_chunk


def split_vocabulary(head: LossHead, mesh: DeviceMesh) -> None:
    """Split the weights of an output layer over `mesh`, and compute its loss and logits together with the others."""
    for name, parameter in list(head.named_parameters(recurse=False)):
        # src_data_rank=None: every rank has the whole tensor; nothing is sent
        part = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
        head.register_parameter(name, nn.Parameter(part, parameter.requires_grad))

    def forward(self: LossHead, features: Tensor, targets: Tensor | None = None) -> Tensor | Losses:
        weight, bias = _local(self.weight), None if self.bias is None else _local(self.bias)
        assert weight is not None
        if targets is None:
            return _logits(features, weight, bias, mesh)
        return _losses(features.flatten(0, -2), weight, bias, targets.flatten(), mesh)

    head.forward = MethodType(forward, head)  # type: ignore[method-assign]


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None, mesh: DeviceMesh) -> Tensor:
    """Return all logits, for code that computes its own loss and for predictions."""
    part = functional.linear(_SumGradients.apply(features, mesh.get_group()), weight, bias)  # type: ignore[no-untyped-call]
    return DTensor.from_local(part, mesh, [Shard(part.ndim - 1)], run_check=False).full_tensor()


def _losses(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mesh: DeviceMesh) -> Losses:
    """Return the sums over all positions, in chunks whose logits are recomputed in the backward pass."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    features = _SumGradients.apply(features, group)  # type: ignore[no-untyped-call]
    rows = rows_of_chunk(features.device.type, len(weight), len(features))

    def of_chunk(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional.linear(features, weight, bias).float()
        found: tuple[Tensor, Tensor] = _CrossEntropy.apply(logits, targets, rank * len(weight), group)  # type: ignore[no-untyped-call]
        return found

    totals, correct = [], []
    for part, wanted in zip(features.split(rows), targets.split(rows), strict=True):  # type: ignore[no-untyped-call]
        if rows < len(features) and torch.is_grad_enabled():
            total, right = checkpoint(of_chunk, part, wanted, use_reentrant=False)
        else:
            total, right = of_chunk(part, wanted)
        totals.append(total)
        correct.append(right)
    return Losses(torch.stack(totals).sum(), (targets != IGNORED).sum(), torch.stack(correct).sum())


class _SumGradients(torch.autograd.Function):
    """The identity, whose gradient is the sum of those of all ranks: each has that of its part of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _CrossEntropy(torch.autograd.Function):
    """The sum of the losses, and without gradients the number of correct predictions, as `cross_entropy` has them.

    Logits: this rank's columns, from `first` on, of shape `(positions, columns)` in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        largest, index = logits.max(-1)
        most = largest.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        exponentials = (logits - most[:, None]).exp_()
        column, counts = targets - first, targets != IGNORED
        is_mine = (column >= 0) & (column < logits.shape[-1])
        column = column.where(is_mine, 0)
        of_target = logits.gather(-1, column[:, None])[:, 0].where(is_mine, 0.0)
        sums = torch.stack([exponentials.sum(-1), of_target])
        dist.all_reduce(sums, group=group)
        losses = (sums[0].log() + most - sums[1]).where(counts, 0.0)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(exponentials.div_(sums[0][:, None]), column, is_mine, counts)
            correct = counts.sum() * 0
        else:
            predicted = (index + first).where(largest == most, torch.iinfo(torch.int64).max)
            dist.all_reduce(predicted, dist.ReduceOp.MIN, group)  # of several largest the first, as argmax
            correct = (predicted == targets).sum()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, column, is_mine, counts = ctx.saved_tensors
        gradient = probabilities.scatter_add(-1, column[:, None], -is_mine.to(probabilities.dtype)[:, None])
        return gradient.mul_(counts[:, None] * gradients[0]), None, None, None
