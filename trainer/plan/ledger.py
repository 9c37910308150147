"""Adds up allocations by part of the memory, and keeps what there was at the peak. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Bytes that are allocated now, and at the peak."""

    alive: Counter[str] = field(default_factory=Counter)
    total: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)

    def take(self, part: str, size: int) -> int:
        """Allocate `size` bytes for `part`, and return `size`."""
        self.alive[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, {key: value for key, value in self.alive.items() if value}
        return size

    def free(self, part: str, size: int) -> None:
        """Free `size` bytes of `part`."""
        self.alive[part] -= size
        self.total -= size
