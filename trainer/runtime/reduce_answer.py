"""What `trainer.runtime.all_reduce_speed` prints, a rank of the speed test of preflight, doctor. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core import records
from trainer.core.records import BadRecord


@dataclass(frozen=True, kw_only=True)
class ReduceSpeed:
    """How far a rank came: printed when it has joined, and again with each figure."""

    joined: bool
    """True."""
    bytes_per_s: float | None = None
    """Bytes of the tensor per second (algorithm bandwidth)."""
    kind: str | None = None
    """Arithmetic of the matrix product."""
    flops_s: float | None = None
    """FLOP/s of a matrix product on the device of this rank, while the other ranks compute as well."""


def told(output: str) -> ReduceSpeed | None:
    """Return the last of them in the output of a rank; None: it has not joined. Other lines are those of libraries."""
    for line in reversed(output.splitlines()):
        try:
            return records.loads(ReduceSpeed, line, "the answer of a rank")
        except BadRecord:
            continue
    return None
