"""The output layer of a language model, and its cross entropy without the logits of all positions in memory.

The logits of a micro-batch of 64 x 1024 tokens and GPT-2's 50,257 token ids take 13 GB in float32, and so do their
logarithms and their gradient. Here they exist for one chunk of positions at a time. The gradients are computed in the
forward pass, from the same chunk, so that no matrix product is computed twice: Liger (Hsu et al. 2024), section 3.2.
`torch.nn.functional.linear_cross_entropy` does the same, but releases before torch 2.13 do not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

IGNORED = -100
"""A target that is ignored."""
CHUNK_BYTES = {"cpu": 2**25}
"""Bytes of a chunk of logits in float32, by device type.

On a CPU a chunk that fits the caches is faster, and larger ones are returned to the system and requested again.
"""
CHUNK_BYTES_ELSEWHERE = 2**30
"""The same on a GPU: large enough that adding a chunk to the weight's gradient is a few percent of its products."""

Chunk = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Losses(NamedTuple):
    """Sums over the positions whose target is not ignored, in float32 or wider."""

    total: Tensor
    """Sum of the cross entropies in nats, a scalar."""
    tokens: Tensor
    """Number of the positions, a scalar."""
    correct: Tensor
    """Number of positions whose most probable token is the target, a scalar; 0 while gradients are computed."""


class LossHead(nn.Linear):
    """A linear output layer that also computes the cross entropy of its logits.

    The loss equals `cross_entropy(logits.float(), targets)` up to the order of sums: relative differences are about
    1e-6 in float32 and about one unit of rounding of the gradients in bfloat16 (0.4%).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.chunk: Chunk = chunk_of_loss
        """The loss of a chunk and its gradient; `compile_loss` replaces it."""

    def compile_loss(self, **options: Any) -> None:
        """Compile the loss of a chunk, with the arguments of torch.compile."""
        self.chunk = torch.compile(self.chunk, **options)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of shape `(..., vocab_size)`."""
        return super().forward(features)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor | Losses:  # type: ignore[override]
        """Return logits of shape `(..., vocab_size)`, or with targets the sums of their losses.

        Args:
            features: Tensor of shape `(..., dim)`.
            targets: Token ids of shape `(...)`; `IGNORED` where there is none.
        """
        if targets is None:
            return self.logits(features)
        features, targets = features.flatten(0, -2), targets.flatten()
        rows = rows_of_chunk(features.device.type, self.out_features, len(features))
        if rows == len(features) or isinstance(self.weight, DTensor):
            return losses_of(self.logits(features), targets)
        count = (targets != IGNORED).sum()
        if torch.is_grad_enabled():
            arguments = (features, self.weight, self.bias, targets, rows, self.chunk)
            total, correct = _ChunkedLoss.apply(*arguments), count * 0  # type: ignore[no-untyped-call]
        else:
            total, correct = self._evaluate(features, targets, rows)
        return Losses(total, count, correct)

    def _evaluate(self, features: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses and the number of correct predictions."""
        totals, correct = [], []
        for start in range(0, len(features), rows):
            logits, goal = self.logits(features[start : start + rows]), targets[start : start + rows]
            totals.append(functional.cross_entropy(_wide(logits), goal, ignore_index=IGNORED, reduction="sum"))
            correct.append((logits.argmax(-1) == goal).sum())
        return torch.stack(totals).sum(), torch.stack(correct).sum()


def output_of(head: nn.Module, features: Tensor, targets: Tensor | None) -> Tensor | Losses:
    """Return the logits of `features`, or with targets the sums of their losses.

    Args:
        head: The output layer; a LossHead, unless LoRA adapters have replaced it.
        features: Tensor of shape `(batch, length, dim)`.
        targets: Token ids of shape `(batch, length)`.
    """
    if targets is not None and not isinstance(head, LossHead):
        return losses_of(head(features), targets)
    output: Tensor | Losses = head(features) if targets is None else head(features, targets)
    return output


def losses_of(logits: Tensor, targets: Tensor) -> Losses:
    """Return the sums of the losses of `(..., vocab_size)` logits and `(...)` targets, in float32 or wider."""
    logits, targets = logits.flatten(0, -2), targets.flatten()
    total = functional.cross_entropy(_wide(logits), targets, ignore_index=IGNORED, reduction="sum")
    count = (targets != IGNORED).sum()
    return Losses(total, count, count * 0 if torch.is_grad_enabled() else (logits.argmax(-1) == targets).sum())


def rows_of_chunk(device_type: str, vocab_size: int, rows: int) -> int:
    """Return the number of positions, of `rows`, whose logits are in memory at once; all chunks have about as many."""
    most = max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES_ELSEWHERE) // (4 * vocab_size))
    return rows if rows <= most else -(-rows // -(-rows // most))


def chunk_of_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of a chunk, and its gradient with respect to the logits.

    Args:
        logits: Tensor of shape `(rows, vocab_size)`.
        targets: Token ids of shape `(rows,)`.

    Returns:
        The sum in float32 or wider, to which rows with `IGNORED` add nothing, and the gradient in the dtype of
        `logits`, whose rows with `IGNORED` are to be left out.
    """
    index = targets.clamp(min=0).unsqueeze(1)
    log_probabilities = functional.log_softmax(_wide(logits), -1)
    total = -(log_probabilities.gather(1, index) * (targets != IGNORED).unsqueeze(1)).sum()
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, index, gradient.new_full((), -1.0).expand_as(index))
    return total, gradient.to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross entropies of `features @ weight.T + bias`; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, chunk: Chunk
    ) -> Tensor:
        device = features.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
        wide = torch.promote_types(compute, torch.float32)
        with torch.autocast(device, enabled=False):
            cast = weight.to(compute)
            needs_features, needs_weight = ctx.needs_input_grad[:2]
            by_features = torch.empty_like(features) if needs_features else None
            by_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
            by_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None else None
            total = torch.zeros((), dtype=wide, device=features.device)
            for start in range(0, len(features), rows):
                part, goal = features[start : start + rows].to(compute), targets[start : start + rows]
                logits = functional.linear(part, cast, None if bias is None else bias.to(compute))
                loss, gradient = chunk(logits, goal)
                del logits
                total += loss
                # Ignored rows are left out of the small factors: one pass less over the chunk.
                known = (goal != IGNORED).unsqueeze(1).to(compute)
                if by_features is not None:
                    by_features[start : start + rows] = (gradient @ cast) * known
                if by_weight is not None:
                    _add_product(by_weight, gradient.T, part * known)
                if by_bias is not None:
                    by_bias += (gradient.T @ known).squeeze(1)
        ctx.gradients = (by_features, _like(by_weight, weight), _like(by_bias, bias))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, and held by nobody else: `.grad` then takes the weight's gradient without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            problem = "backward through the chunked loss a second time: it has freed its gradients"
            raise RuntimeError(f"{problem}\n  use task=language_modelling task.chunked_loss=false")
        return *(None if one is None else one.mul_(scale) for one in gradients), None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` in place."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _wide(logits: Tensor) -> Tensor:
    """Return the logits in float32, or float64 if they have it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
