"""Which messages about a run are due: notable events, a long wait in the queue, a death that no process reported."""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.notify.message import Message
from trainer.runs.directory import RunDirectory
from trainer.runs.events import (
    Created,
    Ended,
    Event,
    Notified,
    Queued,
    Requeued,
    Resumed,
    Tracking,
)
from trainer.runs.state import State
from trainer.runs.trouble import trouble_of, without_repetitions

_SURE_S = 180.0
"""Seconds of silence after which a job that SLURM no longer lists is dead: it may be about to be requeued."""
NOTABLE_EVENTS = frozenset(
    ("finished", "failed", "hung", "requeued", "hang", "straggler", "not_finite", "loss_spike"),
)
"""Names of the events in `events.jsonl` that may lead to a message."""


@dataclass(frozen=True)
class Due:
    """A message, and the key under which it is recorded as sent."""

    key: str
    message: Message


@dataclass(frozen=True)
class _Found:
    """A notable event of a kind."""

    kind: str
    key: str
    title: str
    """What happened, behind the name of the run."""
    time: float
    step: int | None = None
    reason: str = ""
    verb: str = "why"
    """The verb of `trainer` to type next."""
    state: str = "running"


def due(
    run: RunDirectory,
    options: Mapping[str, Any],
    state: State,
    *,
    why_it_waits: Callable[[], list[str]] | None = None,
    now: float | None = None,
) -> list[Due]:
    """Return the messages to send now, oldest first.

    Args:
        run: The run.
        options: The section `notify`.
        state: The state of the run.
        why_it_waits: Returns sentences on why the job is pending, the reason first.
        now: Seconds since 1970.
    """
    now = time.time() if now is None else now
    events = _since_launch(run.events())
    sent = {event.key: event for event in events if isinstance(event, Notified)}
    found = [*_of_events(run, events, int(options["after_requeues"])), *_of_death(run, events, state, now)]
    waiting_s = _waiting_s(events, state, now)
    if waiting_s is not None and waiting_s >= 60.0 * float(options["pending_after_minutes"]):
        found.append(_of_queue(state, waiting_s, why_it_waits, now))
    wanted = [one for one in found if one.kind in options["events"] and one.key not in sent]
    last = {event.about: event.time for event in sent.values()}
    return [Due(one.key, _message(run, one, events)) for one in without_repetitions(wanted, last, now)]


def _since_launch(events: Sequence[Event]) -> list[Event]:
    """Return the events since the run was created, or was resumed by the user."""
    starts = [index for index, event in enumerate(events) if isinstance(event, (Created, Resumed))]
    return list(events[starts[-1] if starts else 0 :])


def _of_events(run: RunDirectory, events: Sequence[Event], after_requeues: int) -> Iterator[_Found]:
    requeues, reason = 0, ""
    for event in events:
        if isinstance(event, Ended):
            # The rank that saves knows only that it was asked to; the job script has written down why.
            outcome = run.outcome(event.attempt) if event.attempt is not None and event.event == "preempted" else None
            reason = (outcome.reason if outcome else event.reason) or ""
            if event.event in ("finished", "failed", "hung"):
                yield _of_end(event)
        elif isinstance(event, Requeued):
            requeues += 1
            if requeues % after_requeues == 0:
                times = "once" if requeues == 1 else f"{requeues} times"
                found = _Found("requeued", f"requeued:{requeues}", f"was requeued {times}", time=event.time)
                yield replace(found, reason=reason, verb="show", state="requeued")
        elif (one := trouble_of(event)) is not None:
            yield _Found(one.kind, one.key, one.title, time=one.time, step=one.step, reason=one.reason)


def _of_end(event: Ended) -> _Found:
    kind = "finished" if event.event == "finished" else "failed"
    title = event.event + (f" at step {event.step}" if event.step is not None else "")
    found = _Found(kind, f"{kind}:{event.attempt}", title, time=event.time, step=event.step, state=kind)
    return replace(found, reason=event.reason or "", verb="show" if kind == "finished" else "resume")


def _waiting_s(events: Sequence[Event], state: State, now: float) -> float | None:
    """Return for how long the run has been in the queue; None if it is not there."""
    if state.name not in ("queued", "requeued"):
        return None
    since = next((event.time for event in reversed(events) if isinstance(event, (Queued, Requeued, Resumed))), None)
    return None if since is None else now - since


def _of_queue(state: State, waiting_s: float, why_it_waits: Callable[[], list[str]] | None, now: float) -> _Found:
    reasons = why_it_waits() if why_it_waits is not None else []
    title, key = f"is pending for {waiting_s / 60:.0f} min", f"pending:{now - waiting_s:.3f}"
    return _Found("pending", key, title, time=now, reason="; ".join(reasons) or state.reason, state=state.name)


def _of_death(run: RunDirectory, events: Sequence[Event], state: State, now: float) -> Iterator[_Found]:
    """Yield the end of a run that no process of it could report."""
    launch, beat = run.launch(), run.heartbeat(0)
    if state.name != "dead" or not launch.was_made:
        return
    last = max((event.time for event in events if not isinstance(event, Notified)), default=0.0)
    if launch.slurm_job_id and now - max(last, beat.time if beat else 0.0) < _SURE_S:
        return
    step = beat.step if beat else None
    title = "died" + (f" at step {step}" if step is not None else "")
    found = _Found("failed", f"dead:{last:.3f}", title, time=now, step=step)
    yield replace(found, reason=state.reason, verb="resume", state="dead")


def _message(run: RunDirectory, one: _Found, events: Sequence[Event]) -> Message:
    url = next((event.url for event in reversed(events) if isinstance(event, Tracking) and event.url), None)
    launch = run.launch()
    return Message(
        event=one.kind,
        title=f"{run.path.name} {one.title}",
        run=run.path.name,
        id=run.id,
        state=one.state,
        step=one.step,
        reason=one.reason,
        next=f"trainer {one.verb} {shlex.quote(str(run.path.absolute()))}",
        path=str(run.path.absolute()),
        host=launch.host or socket.gethostname(),
        wandb=url,
        time=one.time,
    )
