"""Rotary position embeddings: Su et al. 2021 (RoFormer), with the halves paired as in Llama's published weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Cosines and sines of the rotation angles of every position.

    Position p rotates the pair i of a head by the angle `p * theta ** (-2i / head_dim)`.

    Args:
        head_dim: Size of a head; even.
        length: Number of positions.
        theta: Base of the wavelengths.
    """

    cos: Tensor
    """Shape `(length, head_dim)`; not in the state dict."""
    sin: Tensor
    """Shape `(length, head_dim)`; not in the state dict."""

    def __init__(self, head_dim: int, length: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.length, self.theta = head_dim, length, theta
        self.register_buffer("cos", torch.empty(length, head_dim, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(length, head_dim, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Apply `fn`, such as a move to a device, but stay in float32 where it changes the dtype.

        bfloat16 has 8 bits: it would give position 1,000 the angle of position 1,001 in the fastest pair.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = self.cos.float(), self.sin.float()
            if not self.cos.is_meta:
                self.reset_parameters()
        return self

    def reset_parameters(self) -> None:
        """Fill the buffers in place: no checkpoint holds them, and a model from the meta device has none."""
        exponents = torch.arange(0, self.head_dim, 2, device=self.cos.device, dtype=torch.float32) / self.head_dim
        angles = torch.outer(torch.arange(self.length, device=self.cos.device), self.theta**-exponents)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def cos_sin(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and the sines of the first positions, each of shape `(length, head_dim)`."""
        return self.cos[:length], self.sin[:length]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their positions, computed in float32.

    Args:
        x: Tensor of shape `(batch, heads, length, head_dim)`.
        cos: Cosines of shape `(length, head_dim)`.
        sin: Sines of shape `(length, head_dim)`.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
