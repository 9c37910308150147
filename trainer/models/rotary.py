"""Rotary position embeddings: Su et al. 2021, with the halves paired as in Llama's published weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Cosines and sines of every position up to `length`; `size` is that of a head."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, size: int, length: int, theta: float) -> None:
        super().__init__()
        self.size, self.length, self.theta = size, length, theta
        self.register_buffer("cosine", torch.empty(length, size), persistent=False)
        self.register_buffer("sine", torch.empty(length, size), persistent=False)

    def reset_parameters(self) -> None:
        """Fill the buffers in place: they are in no checkpoint, and a model from the meta device has none."""
        exponents = torch.arange(0, self.size, 2, device=self.cosine.device, dtype=torch.float32) / self.size
        angles = torch.outer(torch.arange(self.length, device=self.cosine.device), self.theta**-exponents)
        angles = torch.cat((angles, angles), dim=-1)
        self.cosine.copy_(angles.cos())
        self.sine.copy_(angles.sin())

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """(length, size) cosines and sines."""
        return self.cosine[:length], self.sine[:length]

    @staticmethod
    def turn(vectors: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Turn (n, heads, length, size) vectors by their positions; keeps their type."""
        cosine, sine = angles
        first, second = vectors.chunk(2, dim=-1)
        return (vectors * cosine + torch.cat((-second, first), dim=-1) * sine).to(vectors.dtype)
