"""Detect a hang from the heartbeats of the ranks. Runs in the node process and imports no torch.

The ranks write heartbeats in `runtime/heartbeat.py`. `hang_response.py` calls this in each round of the supervisor, and
acts on what it finds: stack traces, the end of the attempt. The limits are `resilience.hang_*` of `config/schema.py`.

Times are by the clock of this process: it notes when it saw the progress in a heartbeat change. So the clocks of the
hosts may differ.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.runs.directory import RunDirectory
from trainer.runs.records import HeartbeatRecord

_STEPS_OF_MEDIAN = 64
_WAITING = ("/torch/distributed/", "/torch/autograd/graph.py", "/deepspeed/comm/")
"""Files of the innermost Python frame of a rank that waits in a collective, also within the backward pass."""


@dataclass(frozen=True)
class Allowances:
    """Longest times without progress, in seconds."""

    factor: float
    """Limit as a multiple of the median step time."""
    floor_s: float
    """Least limit."""
    slow_s: float
    """Limit of phases that have no step time to compare with: start-up, first step, validation, saving, the end."""

    @staticmethod
    def of(resilience: Mapping[str, Any]) -> Allowances:
        """Read them from `resilience.*`."""
        return Allowances(
            float(resilience.get("hang_factor", 20.0)),
            float(resilience.get("hang_after_s", 180.0)),
            float(resilience.get("hang_slow_s", 1800.0)),
        )


@dataclass(frozen=True)
class Place:
    """Progress of a rank, from its heartbeat."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    progress: int


@dataclass(frozen=True)
class Hang:
    """A job in which no rank has made progress for longer than the limit."""

    places: list[Place]
    still_s: float
    allowed_s: float


def uneven(places: list[Place]) -> str | None:
    """Return the usual cause when some ranks train and others have finished the epoch; None in other cases."""
    training = [place.rank for place in places if place.phase == "train"]
    beyond = [place.rank for place in places if place.phase in ("validate", "finish", "finished")]
    if not training or not beyond:
        return None
    who, others = (f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}" for ranks in (beyond, training))
    return (
        f"{who} had no batches left while {others} trained: a loader gives the ranks different numbers of batches;"
        " give each rank the same number"
    )


class HangDetector:
    """Watches one attempt. Call `check` about once a second with the result of `places_of`."""

    def __init__(self, allowances: Allowances, now: float) -> None:
        self._allowances = allowances
        self._moved = now
        self._places: tuple[Place, ...] = ()
        self._first_step: int | None = None
        self._stepped: tuple[int, float] | None = None
        self._step_times: deque[float] = deque(maxlen=_STEPS_OF_MEDIAN)

    def check(self, places: list[Place], now: float) -> Hang | None:
        """Return the hang once nothing has changed for longer than the limit. A change resets the time."""
        seen = tuple(places)
        if seen != self._places:
            self._note_step(places, now)
            self._places, self._moved = seen, now
            return None
        allowed_s = self.allowed_s()
        still_s = now - self._moved
        return Hang(places, still_s, allowed_s) if still_s > allowed_s else None

    def allowed_s(self) -> float:
        """Return the limit for the current phase of the ranks, in seconds."""
        trains = bool(self._places) and all(place.phase == "train" for place in self._places)
        if not trains or not self._step_times:
            return max(self._allowances.slow_s, self._allowances.floor_s)
        return max(self._allowances.floor_s, self._allowances.factor * statistics.median(self._step_times))

    def _note_step(self, places: list[Place], now: float) -> None:
        """Record a step time, from two checks between which the slowest rank only trained."""
        if not places or any(place.phase != "train" for place in places):
            self._stepped = None
            return
        step = min(place.step for place in places)
        if self._first_step is None:
            self._first_step = step
        if step > self._first_step:
            if self._stepped is not None and step > self._stepped[0]:
                self._step_times.append((now - self._stepped[1]) / (step - self._stepped[0]))
            if self._stepped is None or step > self._stepped[0]:
                self._stepped = (step, now)


def places_of(beats: Mapping[int, HeartbeatRecord], attempt: int) -> list[Place]:
    """Return the progress of the ranks of this attempt that have written a heartbeat, in order of rank."""
    return [
        Place(rank, beat.host, beat.pid, beat.step, beat.phase, beat.progress)
        for rank, beat in beats.items()
        if beat.attempt == attempt and beat.host is not None and beat.pid is not None
    ]


@dataclass(frozen=True)
class Blame:
    """The rank that caused a hang, and its position."""

    place: Place | None
    """None if the evidence does not single out a rank."""
    where: str
    """Innermost frame, or why there is none."""


def blame(
    hang: Hang, run: RunDirectory, attempt: int, missing: Sequence[int] = (), answered: Sequence[int] = ()
) -> Blame:
    """Return the rank that caused the hang.

    The evidence, in this order: it wrote no stacks; it alone has not entered a collective; its step is behind; its
    stack is not in a collective.

    Args:
        hang: The hang.
        run: The run, which has the stacks.
        attempt: The attempt that hangs.
        missing: Ranks that have not entered a collective in which others wait.
        answered: Ranks that wrote a trace. Their stacks may be missing only because another node requested them late.
    """
    if not hang.places:
        return Blame(None, "no rank has written a heartbeat")
    stacks = {place.rank: main_stack(run.stacks(attempt, place.rank)) for place in hang.places}
    silent = [place for place in hang.places if not stacks[place.rank] and place.rank not in answered]
    if silent and len(silent) < len(hang.places):  # its heartbeat is old as well, so its step is no evidence
        return Blame(silent[0], "no response to SIGUSR2: stopped, or stuck in the kernel")
    if len(missing) == 1:
        (culprit,) = [place for place in hang.places if place.rank == missing[0]]
        return Blame(culprit, _where(stacks[culprit.rank]))
    behind = min(place.step for place in hang.places)
    late = [place for place in hang.places if place.step == behind]
    if len(late) < len(hang.places):
        return Blame(late[0], _where(stacks[late[0].rank]))
    busy = [place for place in late if stacks[place.rank] and not _waits(stacks[place.rank])]
    if (busy and len(busy) < len(late)) or len(late) == 1:
        culprit = (busy or late)[0]
        return Blame(culprit, _where(stacks[culprit.rank]))
    return Blame(None, f"all ranks are in {_where(stacks[late[0].rank])}")


def main_stack(path: Path) -> list[str]:
    """Return the frames of the main thread in the last dump of faulthandler, innermost first; empty without a dump."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    # faulthandler writes the newest thread first, the main thread last.
    starts = [index for index, line in enumerate(lines) if "(most recent call first)" in line]
    if not starts:
        return []
    return [line.strip() for line in lines[starts[-1] + 1 :] if line.startswith("  File ")]


def _waits(stack: list[str]) -> bool:
    return any(part in stack[0] for part in _WAITING)


def _where(stack: list[str]) -> str:
    """Return the innermost frame: `File "train.py", line 12 in step`."""
    return stack[0] if stack else "an unknown place (no stack was written)"
