"""Find the straggler, the rank that the others wait for at every step, from the heartbeats. Imports no torch.

A whole step takes equally long on all ranks, because it ends in a collective. The ranks differ in the part of a step in
which no rank waits for another: reading the data and the forward pass (`own_s`), and on a GPU also the forward pass
alone (`forward_s`). With sharded parameters (fsdp, ZeRO-3) the ranks also wait for each other in the forward pass,
where they gather parameters; they differ in the time before it (`data_s`), and under fsdp on a GPU in one block, once
its parameters are there (`forward_s`). All times of a rank on a GPU are by the clock of the GPU
(`callbacks/device_time.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.runs import events
from trainer.runs.records import HeartbeatRecord

LEAST_BATCHES = 16
"""Fewest batches for a meaningful median."""
LEAST_SHARE = 0.1
"""Smallest share of the batch time that a straggler must cost the others."""
_MEASURES = {
    "own_s": "its data and forward pass",
    "data_s": "what comes before its forward pass",
    "forward_s": "the forward pass on its device",
}


@dataclass(frozen=True)
class Pace:
    """Medians from the heartbeat of one rank, in seconds per batch."""

    rank: int
    host: str
    device: str
    batch_s: float
    measures: dict[str, float]
    """Values of `_MEASURES` that the heartbeat has."""


@dataclass(frozen=True)
class Straggler:
    """A rank that takes `factor` times as long as the median of the others for `what`."""

    pace: Pace
    what: str
    own_s: float
    others_s: float

    @property
    def factor(self) -> float:
        """Ratio of its time to that of the others."""
        return self.own_s / self.others_s

    @property
    def waiting_share(self) -> float:
        """Share of each step that the others spend waiting for this rank."""
        return min(1.0, (self.own_s - self.others_s) / self.pace.batch_s)

    def __str__(self) -> str:
        return (
            f"rank {self.pace.rank} on {self.pace.host} ({self.pace.device}) takes {self.own_s:.3g} s for {self.what}, "
            f"the others {self.others_s:.3g} s: {self.waiting_share:.0%} of each step is waiting for it"
        )

    def event(self, attempt: int) -> events.Straggler:
        """Return the event of the run."""
        return events.Straggler(
            attempt=attempt,
            rank=self.pace.rank,
            host=self.pace.host,
            device=self.pace.device,
            own_s=self.own_s,
            others_s=self.others_s,
            batch_s=self.pace.batch_s,
            reason=str(self),
        )


class StragglerWatch:
    """Watches the ranks of one attempt. Each straggler is reported once.

    Args:
        factor: A straggler takes this many times as long as the median of the others. 0 disables the watch.
        after_s: Seconds for which a rank must be the slowest before it is reported.
    """

    def __init__(self, factor: float, after_s: float) -> None:
        self.factor, self._after_s = factor, after_s
        self._since: tuple[int, float] | None = None
        self._reported: set[int] = set()

    def check(self, paces: Sequence[Pace], now: float) -> Straggler | None:
        """Return a straggler that has not been reported yet."""
        straggler = slowest(paces, self.factor)
        if straggler is None or straggler.pace.rank in self._reported:
            self._since = None
            return None
        if self._since is None or self._since[0] != straggler.pace.rank:
            self._since = (straggler.pace.rank, now)
        if now - self._since[1] < self._after_s:
            return None
        self._reported.add(straggler.pace.rank)
        return straggler


def slowest(paces: Sequence[Pace], factor: float) -> Straggler | None:
    """Return the slowest rank if it is `factor` times as slow as the others and costs them `LEAST_SHARE` of a step."""
    stragglers = []
    for measure, what in _MEASURES.items():
        having = [pace for pace in paces if measure in pace.measures]
        if len(having) < 2 or len(having) < len(paces):
            continue
        slow = max(having, key=lambda pace: pace.measures[measure])
        others_s = statistics.median(pace.measures[measure] for pace in having if pace is not slow)
        one = Straggler(slow, what, slow.measures[measure], others_s)
        if others_s > 0 and one.factor >= factor and one.waiting_share >= LEAST_SHARE:
            stragglers.append(one)
    return max(stragglers, key=lambda one: one.factor, default=None)


def paces_of(beats: Mapping[int, HeartbeatRecord], attempt: int, world_size: int) -> list[Pace]:
    """Return the pace of each rank, in order; empty until every rank has trained `LEAST_BATCHES` batches."""
    paces = []
    for rank in range(world_size):
        beat = beats.get(rank)
        if beat is None or beat.attempt != attempt or beat.phase != "train" or beat.batches < LEAST_BATCHES:
            return []
        if beat.host is None or beat.batch_s is None:
            return []
        measures = {name: value for name in _MEASURES if (value := getattr(beat, name)) is not None}
        paces.append(Pace(rank, beat.host, beat.device or "cpu", beat.batch_s, measures))
    return paces
