"""Troubles of a run that still trains, and which of them are worth a message to people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from trainer.runs.events import BadStepEvent, Event, Hang, Straggler

Kind = Literal["hang", "straggler", "nan"]
QUIET_S = 600.0
"""Shortest time between two messages of one of these kinds: a loss may be NaN at every step."""
REPEATED: tuple[Kind, ...] = ("hang", "straggler", "nan")


@dataclass(frozen=True)
class Trouble:
    """A hang, a straggler, or a loss or gradient that is not finite."""

    kind: Kind
    key: str
    """Distinguishes it from others of its kind."""
    title: str
    """What happened, to be read behind the name of the run."""
    time: float
    step: int | None
    reason: str


def trouble_of(event: Event) -> Trouble | None:
    """Return the trouble that an event records; None: none."""
    if isinstance(event, Straggler):
        return _trouble("straggler", f"waits for rank {event.rank} on {event.host}", None, event)
    if isinstance(event, Hang):
        return _trouble("hang", f"hangs at step {event.step}" if event.step is not None else "hangs", event.step, event)
    if isinstance(event, BadStepEvent):
        what = "loss or gradient not finite" if event.event == "not_finite" else "loss spike"
        title = f"{what} at step {event.step}" + (f": {event.action}" if event.action else "")
        return _trouble("nan", title, event.step, event)
    return None


def _trouble(kind: Kind, title: str, step: int | None, event: Hang | Straggler | BadStepEvent) -> Trouble:
    return Trouble(kind, f"{kind}:{event.time:.3f}", title, event.time, step, event.reason or "")


class _HasKind(Protocol):
    @property
    def kind(self) -> str: ...


T = TypeVar("T", bound=_HasKind)


def without_repetitions(found: Sequence[T], last: Mapping[str, float], now: float) -> Iterator[T]:
    """Yield what is worth a message: of the repeated kinds the newest only, and none soon after the last.

    Args:
        found: What happened, oldest first.
        last: Kind to the time of its last message.
        now: Seconds since 1970.
    """
    newest = {one.kind: one for one in found}
    for one in found:
        if one.kind not in REPEATED or (newest[one.kind] is one and now - last.get(one.kind, 0.0) >= QUIET_S):
            yield one
