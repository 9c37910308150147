"""Attention within documents: several documents packed in one sequence do not see each other.

On CUDA the mask is that of `torch.nn.attention.flex_attention`, whose kernel skips blocks of pairs that are all masked;
elsewhere, and with dropout in the attention, it is a tensor for `scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask
"""Which pairs of positions attend: a bool tensor of shape `(batch, 1, length, length)`, or flex attention's form."""


def documents_of(tokens: Tensor, end: int) -> Tensor:
    """Return the number of each token's document within its row, shape `(batch, length)`.

    Args:
        tokens: Token ids of shape `(batch, length)`.
        end: The token that ends a document, and belongs to it.
    """
    ends = (tokens == end).long()
    return ends.cumsum(1) - ends


def positions_of(documents: Tensor) -> Tensor:
    """Return each token's position within its document, shape `(batch, length)`, from `documents_of`."""
    index = torch.arange(documents.shape[1], device=documents.device)
    is_first = functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    starts: Tensor = torch.where(is_first, index, 0).cummax(1).values
    return index - starts


def document_mask(documents: Tensor, *, flex: bool) -> Mask:
    """Return the causal mask within documents.

    Args:
        documents: Result of `documents_of`.
        flex: Return the mask of flex attention.
    """
    batch, length = documents.shape

    def attends(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    if flex:
        mask: BlockMask = _create(documents.is_cuda)(attends, batch, None, length, length, device=documents.device)
        return mask
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, *, causal: bool, dropout: float) -> Tensor:
    """Return `softmax(Q K^T / sqrt(head_dim)) V` through torch's fused kernels.

    Args:
        query: Tensor of shape `(batch, heads, length, head_dim)`.
        key: Tensor of shape `(batch, kv_heads, length, head_dim)`.
        value: Tensor of the shape of `key`.
        mask: The pairs that attend; None: all, or with `causal` each position to itself and those before it.
        causal: Whether positions attend to earlier ones only; a mask says it itself.
        dropout: Dropout probability of the attention weights; 0 with a mask of flex attention.
    """
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        mixed: Tensor = _flex(query.is_cuda)(query, key, value, block_mask=mask, enable_gqa=grouped)
        return mixed
    is_causal = causal and mask is None
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=grouped
    )


def _flex(fused: bool) -> Callable[..., Any]:
    """Return flex attention; `fused`: its kernel, which torch.compile makes, also in a model that is not compiled."""
    plain: Callable[..., Any] = flex_attention
    return plain if not fused or torch.compiler.is_compiling() else _compiled(plain)


def _create(fused: bool) -> Callable[..., Any]:
    """Return `create_block_mask`; compiled, it does not hold all pairs of positions in memory."""
    return _compiled(create_block_mask) if fused else create_block_mask


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled
