"""Makes fake tensors on the CPU need the memory that they would need on CUDA.

Known differences between the kernels, which are imitated: autocast computes norms and the loss in float32; RMSNorm is
one kernel that keeps its input and one number per row; dropout keeps a mask of one byte, and none in the attention;
the loss of a language model has larger chunks. Not imitated:
the float32 workspace of flash attention's backward pass (4 bytes per element of the queries), and the temporary tensors
of a fused optimizer, of which there are none on either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from trainer.models import linear_cross_entropy


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside this context, operators keep as much memory as CUDA's would.

    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/autocast_mode.h
    """
    chunk = {"cpu": linear_cross_entropy.CHUNK_BYTES_ELSEWHERE}
    replaced: dict[str, Any] = {
        name: _in_float32(getattr(functional, name)) for name in ("layer_norm", "cross_entropy")
    }
    replaced |= {"rms_norm": _in_float32(_rms_norm), "dropout": _dropout}
    with (
        mock.patch.multiple(functional, **replaced),
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
        mock.patch.dict(linear_cross_entropy.CHUNK_BYTES, chunk),
    ):
        yield


class _RMSNorm(torch.autograd.Function):
    """The memory of CUDA's kernel, without its values."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, normalized: int) -> Tensor:
        rows = features.shape[: features.dim() - normalized]
        ctx.save_for_backward(features, weight, features.new_empty(rows, dtype=torch.float32))
        return features.clone()  # the kernel reads and writes as much

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, _ = ctx.saved_tensors
        return features + gradients[0], None if weight is None else torch.empty_like(weight), None


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    result: Tensor = _RMSNorm.apply(input, weight, len(normalized_shape))  # type: ignore[no-untyped-call]
    return result


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


_original_attention = functional.scaled_dot_product_attention


def _attention(*arguments: Any, dropout_p: float = 0.0, **named: Any) -> Tensor:
    """Compute attention without dropout: CUDA's kernels keep the state of the random numbers, not a mask."""
    return _original_attention(*arguments, **named)


def _in_float32(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(*arguments: Any, **named: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return original(*arguments, **named)
        arguments, named = (torch.utils._pytree.tree_map_only(Tensor, _float, values) for values in (arguments, named))
        return original(*arguments, **named)

    return function


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
