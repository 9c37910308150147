"""What computes in float32 in mixed precision, although FSDP2 and DeepSpeed give all layers weights in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

_STRICT: tuple[type, ...] = (
    nn.Bilinear,
    *([nn.LinearCrossEntropyLoss] if hasattr(nn, "LinearCrossEntropyLoss") else []),  # from torch 2.13
)
"""Layers with matrices that want inputs and weights of one dtype, and that autocast does not cast."""


def compute_as_autocast(module: nn.Module) -> None:
    """Let layers outside of matrix products compute as under autocast with float32 weights, as in ddp; in place.

    FSDP2 gathers all weights in bfloat16, but autocast casts only the inputs of matrix products. So what an embedding
    returns, and what is then added to it, is float32 here. A layer of vectors only (batch, group and instance
    normalization, and most normalization layers of users) gets its weights in float32 while it computes: kernels
    that torch does not cast refuse weights narrower than their input or their running statistics.
    """
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            part.register_forward_hook(_widen)
        elif getattr(part.forward, "__func__", None) in (nn.RMSNorm.forward, nn.LayerNorm.forward):
            part.forward = MethodType(_normalize, part)
        elif _computes_wide(part):
            part.forward = partial(_with_wide_weights, part, part.forward)


def normalize_with_wide_weights(module: nn.Module) -> None:
    """Give layers with running statistics their weights in float32 while they compute, in place.

    DeepSpeed's mixed precision has no autocast: features and weights are in 16 bits, but buffers stay in float32, and
    CPU kernels of batch normalization take weights only in the type of the statistics.
    """
    for part in module.modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            part.forward = partial(_with_wide_weights, part, part.forward)


def _widen(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _normalize(norm: nn.RMSNorm | nn.LayerNorm, features: Tensor) -> Tensor:
    """Replace the forward pass: the weights get the type of the features, which torch's fast kernels require."""
    weight = None if norm.weight is None else norm.weight.to(features.dtype)
    if isinstance(norm, nn.RMSNorm):
        return functional.rms_norm(features, norm.normalized_shape, weight, norm.eps)
    bias = None if norm.bias is None else norm.bias.to(features.dtype)
    return functional.layer_norm(features, norm.normalized_shape, weight, bias, norm.eps)


def _computes_wide(part: nn.Module) -> bool:
    own = list(part.parameters(recurse=False))
    return bool(own) and (isinstance(part, _STRICT) or all(one.ndim <= 1 for one in own))


def _with_wide_weights(layer: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Call `forward` while the layer's own weights are float32: attributes that hide the parameters."""
    wide = {name: one.to(torch.promote_types(one.dtype, torch.float32)) for name, one in _own_weights(layer)}
    layer.__dict__.update(wide)
    try:
        return forward(*inputs, **named)
    finally:
        for name in wide:
            layer.__dict__.pop(name)


def _own_weights(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, one) for name, one in layer._parameters.items() if one is not None and one.is_floating_point()]
