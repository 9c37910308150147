"""Finds the rank that the others wait for at every step, from the ranks' heartbeats alone. Imports no torch.

Whole steps take equally long on all ranks, because each step ends in a collective. What tells the ranks apart is the
part of a step in which none waits for another: reading the data and the forward pass (`own_s`), and on a GPU the
forward pass by the GPU's clock (`forward_s`). Where the parameters are sharded (fsdp, ZeRO-3) the ranks gather them
inside of the forward pass, and so wait for each other there, too: what tells those apart is what comes before it
(`data_s`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.files import read_live

LEAST_BATCHES = 16
"""A median of fewer says nothing."""
LEAST_SHARE = 0.1
"""Of a batch's time: a rank that costs the others less is none to speak of."""
_MEASURES = {
    "own_s": "its data and forward pass",
    "data_s": "what comes before its forward pass",
    "forward_s": "the forward pass on its device",
}


@dataclass(frozen=True)
class Pace:
    """The medians of one rank's heartbeat, in seconds of a batch."""

    rank: int
    host: str
    device: str
    batch_s: float
    measures: dict[str, float]
    """Those of `_MEASURES` that it has."""


@dataclass(frozen=True)
class Straggler:
    """A rank that is `factor` times as slow as the median of the others in `what`."""

    pace: Pace
    what: str
    own_s: float
    others_s: float

    @property
    def factor(self) -> float:
        return self.own_s / self.others_s

    @property
    def waiting_share(self) -> float:
        """Of each step, what the others wait for it."""
        return min(1.0, (self.own_s - self.others_s) / self.pace.batch_s)

    def __str__(self) -> str:
        return (
            f"rank {self.pace.rank} on {self.pace.host} ({self.pace.device}) takes {self.own_s:.3g} s for {self.what}, "
            f"the others {self.others_s:.3g} s: {self.waiting_share:.0%} of each step is waiting for it"
        )

    def fields(self) -> dict[str, Any]:
        """Of the event."""
        return {
            "rank": self.pace.rank,
            "host": self.pace.host,
            "device": self.pace.device,
            "own_s": self.own_s,
            "others_s": self.others_s,
            "batch_s": self.pace.batch_s,
            "reason": str(self),
        }


class StragglerWatch:
    """One attempt's watch. A rank is named once, after it has been the slow one for `after_s`. `factor` 0: none is."""

    def __init__(self, factor: float, after_s: float) -> None:
        self.factor, self._after_s = factor, after_s
        self._since: tuple[int, float] | None = None
        self._named: set[int] = set()

    def look(self, paces: Sequence[Pace], now: float) -> Straggler | None:
        found = slowest(paces, self.factor)
        if found is None or found.pace.rank in self._named:
            self._since = None
            return None
        if self._since is None or self._since[0] != found.pace.rank:
            self._since = (found.pace.rank, now)
        if now - self._since[1] < self._after_s:
            return None
        self._named.add(found.pace.rank)
        return found


def slowest(paces: Sequence[Pace], factor: float) -> Straggler | None:
    """The rank that is furthest behind, where it is `factor` times as slow as the others and they feel it."""
    found = []
    for measure, what in _MEASURES.items():
        having = [pace for pace in paces if measure in pace.measures]
        if len(having) < 2 or len(having) < len(paces):
            continue
        slow = max(having, key=lambda pace: pace.measures[measure])
        others_s = statistics.median(pace.measures[measure] for pace in having if pace is not slow)
        one = Straggler(slow, what, slow.measures[measure], others_s)
        if others_s > 0 and one.factor >= factor and one.waiting_share >= LEAST_SHARE:
            found.append(one)
    return max(found, key=lambda one: one.factor, default=None)


def read_paces(live_dir: Path, attempt: int, world_size: int) -> list[Pace]:
    """Of all ranks, by rank; empty until each has trained enough batches to be judged by."""
    found = []
    for rank in range(world_size):
        try:
            beat = read_live(live_dir / f"rank-{rank}.json")
            if beat["attempt"] != attempt or beat["phase"] != "train" or beat["batches"] < LEAST_BATCHES:
                return []
            measures = {name: float(beat[name]) for name in _MEASURES if name in beat}
            device = str(beat.get("device", "cpu"))
            found.append(Pace(rank, str(beat["host"]), device, float(beat["batch_s"]), measures))
        except (ValueError, KeyError, TypeError):  # not there yet
            return []
    return found
