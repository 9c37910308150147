"""Notices that a job stands still, from the ranks' heartbeats alone: for the node process, which imports no torch.

The clock is the watcher's own: what counts is when it *saw* a heartbeat's place change, so hosts may disagree on time.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.files import read_live

STACKS_SUFFIX = ".stacks"
"""`logs/attempt-NN/rank-R.stacks`: what the rank was doing when it was asked (SIGUSR2)."""
_STEPS_OF_MEDIAN = 64
_WAITING = ("/torch/distributed/", "/torch/autograd/graph.py", "/deepspeed/comm/")
"""Innermost Python frames of a rank that waits for the others: collectives, and those inside of backward."""


@dataclass(frozen=True)
class Allowances:
    """How long nothing may move, in seconds."""

    factor: float
    """Times the median step."""
    floor_s: float
    slow_s: float
    """Start-up, first step, validation, saving, the end: what has no step to be measured by."""

    @staticmethod
    def of(resilience: Mapping[str, Any]) -> Allowances:
        return Allowances(
            float(resilience.get("hang_factor", 20.0)),
            float(resilience.get("hang_after_s", 180.0)),
            float(resilience.get("hang_slow_s", 1800.0)),
        )


@dataclass(frozen=True)
class Place:
    """Where a rank stands, by its heartbeat."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    progress: int


@dataclass(frozen=True)
class Hang:
    """No rank has moved for longer than it may."""

    places: list[Place]
    still_s: float
    allowed_s: float


def uneven(places: list[Place]) -> str | None:
    """The usual cause where some ranks train and others are past the epoch; None where they are not."""
    training = [place.rank for place in places if place.phase == "train"]
    beyond = [place.rank for place in places if place.phase in ("validate", "finish", "finished")]
    if not training or not beyond:
        return None
    who, others = (f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}" for ranks in (beyond, training))
    return (
        f"{who} had no batch left while {others} trained: a loader gives the ranks different numbers of batches;"
        " give each rank as many as the others"
    )


class HangWatch:
    """One attempt's watch; call `look` about once a second with what `read_places` gives."""

    def __init__(self, allowances: Allowances, now: float) -> None:
        self._allowances = allowances
        self._moved = now
        self._places: tuple[Place, ...] = ()
        self._first_step: int | None = None
        self._stepped: tuple[int, float] | None = None
        self._step_times: deque[float] = deque(maxlen=_STEPS_OF_MEDIAN)

    def look(self, places: list[Place], now: float) -> Hang | None:
        """The hang, once nothing has moved for longer than allowed; places from `now` on count from anew."""
        seen = tuple(places)
        if seen != self._places:
            self._note_step(places, now)
            self._places, self._moved = seen, now
            return None
        allowed_s = self.allowed_s()
        still_s = now - self._moved
        return Hang(places, still_s, allowed_s) if still_s > allowed_s else None

    def allowed_s(self) -> float:
        """How long nothing may move where the ranks stand now."""
        trains = bool(self._places) and all(place.phase == "train" for place in self._places)
        if not trains or not self._step_times:
            return max(self._allowances.slow_s, self._allowances.floor_s)
        return max(self._allowances.floor_s, self._allowances.factor * statistics.median(self._step_times))

    def _note_step(self, places: list[Place], now: float) -> None:
        """The time of a step, from two looks between which the slowest rank did nothing but train."""
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


def read_places(live_dir: Path, attempt: int) -> list[Place]:
    """The ranks of this attempt that have written a heartbeat, by rank."""
    found = []
    for path in live_dir.glob("rank-*.json"):
        try:
            beat = read_live(path)
            if beat["attempt"] != attempt:
                continue
            found.append(
                Place(
                    int(path.stem.rpartition("-")[2]),
                    str(beat["host"]),
                    int(beat["pid"]),
                    int(beat["step"]),
                    str(beat["phase"]),
                    int(beat.get("progress", 0)),
                )
            )
        except (ValueError, KeyError, TypeError):  # not to be read, or of a worker that knows no better
            continue
    return sorted(found, key=lambda place: place.rank)


@dataclass(frozen=True)
class Blame:
    """The rank that the others wait for, and why it is thought so; no rank where nothing tells them apart."""

    place: Place | None
    where: str


def blame(hang: Hang, attempt_dir: Path, missing: Sequence[int] = (), answered: Sequence[int] = ()) -> Blame:
    """Of the ranks that stand still the one behind: by its silence, by a collective that only it has not come to
    (`missing`), by its step, by a stack that is not a wait.

    `answered`: ranks that have said something else than their stacks, for which another node may have asked late.
    """
    if not hang.places:
        return Blame(None, "no rank has written a heartbeat")
    stacks = {place.rank: main_stack(attempt_dir / f"rank-{place.rank}{STACKS_SUFFIX}") for place in hang.places}
    silent = [place for place in hang.places if not stacks[place.rank] and place.rank not in answered]
    if silent and len(silent) < len(hang.places):  # its heartbeat is old, too: the step in it says nothing
        return Blame(silent[0], "it does not answer: stopped, or stuck in the kernel")
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
    return Blame(None, f"all ranks stand at {_where(stacks[late[0].rank])}")


def main_stack(path: Path) -> list[str]:
    """The frames of the main thread in faulthandler's last dump, innermost first; empty when there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    # faulthandler goes from the newest thread to the oldest, which is the main one.
    starts = [index for index, line in enumerate(lines) if "(most recent call first)" in line]
    if not starts:
        return []
    return [line.strip() for line in lines[starts[-1] + 1 :] if line.startswith("  File ")]


def _waits(stack: list[str]) -> bool:
    return any(part in stack[0] for part in _WAITING)


def _where(stack: list[str]) -> str:
    """`File "train.py", line 12 in step`: the innermost frame."""
    return stack[0] if stack else "an unknown place (it wrote no stack)"
