"""What a rank computes and moves in a step: the numerators of a roofline. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counts:
    """Operations of one pass of a rank."""

    flops: float = 0.0
    """FLOPs of matrix products, convolutions and attention; causal attention is counted for the pairs that attend."""
    matrix_bytes: float = 0.0
    """Bytes that these operators read and write."""
    other_bytes: float = 0.0
    """Bytes that all other operators read and write."""
    operators: int = 0
    """Number of operators that compute: views and allocations are left out."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.flops + other.flops,
            self.matrix_bytes + other.matrix_bytes,
            self.other_bytes + other.other_bytes,
            self.operators + other.operators,
        )

    def __mul__(self, times: int) -> Counts:
        return Counts(self.flops * times, self.matrix_bytes * times, self.other_bytes * times, self.operators * times)


@dataclass(frozen=True)
class Work:
    """Operations of a rank: of a micro-batch forward and backward, and of the update of a step."""

    forward: Counts = field(default_factory=Counts)
    backward: Counts = field(default_factory=Counts)
    """Includes what activation checkpointing computes again."""
    update: Counts = field(default_factory=Counts)
    """Clipping and the optimizer."""
    elements: int = 0
    """Parameters of the whole model."""
    trained: int = 0
    """Those that are trained."""
    units: int = 1
    """Parts that FSDP2 gathers one by one."""
    samples: int = 1
    """Samples of the micro-batch."""
    tokens: int | None = None
    """Tokens of a sample; None: it is not a sequence of tokens."""
    model_flops: float | None = None
    """FLOPs of training on a sample, without what is computed again: the numerator of MFU."""

    @property
    def is_known(self) -> bool:
        """Whether anything was counted."""
        return self.forward.operators > 0
