"""The seconds of a step from what it computes, moves and sends, and from the rates of the hardware.

A roofline (Williams et al. 2009): an operator takes the longer of the time of its arithmetic and that of its memory
traffic. Here matrix products are summed in one such term, and all other operators are bound by memory. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.plan.collectives import Links, Traffic, seconds
from trainer.plan.work import Counts, Work


@dataclass(frozen=True)
class Rates:
    """What the hardware reaches, not its peaks."""

    flops_s: float
    """FLOP/s of large matrix products."""
    bytes_s: float
    """Bytes a second between a device and its memory."""
    operator_s: float
    """Host time to start an operator."""
    is_asynchronous: bool
    """Whether the host starts operators while the device computes, as with CUDA."""
    links: Links
    source: str
    """Where the figures come from."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on a rank, by what they are spent on."""

    matrix: float
    """Matrix products, convolutions and attention."""
    memory: float
    """All other operators of the forward and backward pass."""
    host: float
    """Starting operators, where the device has to wait for it."""
    update: float
    """Clipping and the optimizer."""
    exposed: float
    """Collectives that no computation hides."""
    hidden: float = 0.0
    """Collectives that run while something is computed; not part of the total."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.matrix + self.memory + self.host + self.update + self.exposed


def step_time(work: Work, sent: Sequence[Traffic], accumulate: int, rates: Rates) -> StepTime:
    """Return the time of a step.

    Args:
        work: What a rank does for a micro-batch and in the update.
        sent: The collectives of a step.
        accumulate: Micro-batches of a step.
        rates: What the hardware reaches.
    """
    forward, backward = (_pass(one, rates) for one in (work.forward, work.backward))
    passes = {"forward": sum(forward), "backward": sum(backward), "none": 0.0}
    exposed = hidden = 0.0
    for overlap, available in passes.items():
        each = sum(seconds(one, rates.links) for one in sent if one.overlap == overlap and not one.per_step)
        once = sum(seconds(one, rates.links) for one in sent if one.overlap == overlap and one.per_step)
        last = each + once
        waits = (accumulate - 1) * max(0.0, each - available) + max(0.0, last - available)
        exposed += waits
        hidden += accumulate * each + once - waits
    update = _pass(work.update, rates)
    matrix, memory, host = (accumulate * (one + other) for one, other in zip(forward, backward, strict=True))
    return StepTime(matrix, memory, host, sum(update), exposed, hidden)


def _pass(counts: Counts, rates: Rates) -> tuple[float, float, float]:
    """Return the seconds of matrix products, of other operators, and of waiting for the host."""
    matrix = max(counts.flops / rates.flops_s, counts.matrix_bytes / rates.bytes_s)
    memory = counts.other_bytes / rates.bytes_s
    host = counts.operators * rates.operator_s
    return matrix, memory, max(0.0, host - matrix - memory) if rates.is_asynchronous else host
