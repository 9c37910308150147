"""Account for the time of a run: each second of each attempt is in one class.

A heartbeat has the seconds of its process by phase; the last one of an attempt is kept in `live/attempt-NN-rank-R.json`
when the next attempt begins. The time between two attempts is `down`. The time in which a step waits for other ranks
belongs to the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated, Created, Event, Hang
from trainer.runs.records import HeartbeatRecord

CLASSES = (
    "queue",
    "start",
    "import",
    "build",
    "first_step",
    "train",
    "data",
    "redone",
    "validate",
    "save",
    "finish",
    "hang",
    "down",
)
"""Classes of time.

- `queue` lasts until SLURM starts the job, at first and after each requeue.
- `start` lasts from then, or from the command, until the process group exists; on SLURM it includes the preflight.
- `import` is counted once per launch, also if one process imports for all ranks of a node (`supervise/agent.py`).
- `build` includes loading the checkpoint, `first_step` compilation.
- `train` is the useful steps, `redone` those that an earlier attempt had already done.
- `data` is waiting for a batch, in any step.
- `validate` is validation, `hang` a hang until it was detected.
- `save` is how long training was blocked by checkpoints, which are written in the background.
- `finish` is waiting for the last of them and for the trackers.
- `down` is the time between two attempts.
"""


def ledger(run: RunDirectory, now: float | None = None, rank: int = 0) -> dict[str, Any] | None:
    """Return the time of a run by class.

    Args:
        run: The run.
        now: The end of the account if the run is active, in seconds since 1970.
        rank: The rank whose heartbeats are used.

    Returns:
        Seconds by class (`seconds`), their sum (`wall_s`), the share of `train` in it (`effective`), and the share of
        `train` in the wall time without the queue (`goodput`). None before the first heartbeat of this rank.
    """
    events = run.events()
    attempts = by_attempt(run, events, rank)
    if not attempts:
        return None
    seconds = dict.fromkeys(CLASSES, 0.0)
    edge = next((event.time for event in events if isinstance(event, Created)), attempts[0].began)
    first = edge
    allocated = {
        event.attempt: event.time if event.since is None else event.since
        for event in events
        if isinstance(event, Allocated) and event.event == "allocated"
    }
    for number, attempt in enumerate(attempts):
        until = max(edge, attempt.began)
        start = min(until, max(edge, allocated.get(attempt.attempt, edge)))
        seconds["queue"] += start - edge
        seconds["down" if number else "start"] += until - start
        for name, value in attempt.by_class(attempt.spent).items():
            seconds[name] += value
        # Not `time`: setting the clock during the attempt changes it, but not the seconds spent.
        edge = max(edge, attempt.began + sum(attempt.spent.values()))
    if now is not None and now > edge:
        seconds["down"] += now - edge
        edge = now
    wall_s = edge - first
    without_queue_s = wall_s - seconds["queue"]
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "wall_s": round(wall_s, 3),
        "effective": _share(seconds["train"], wall_s),
        "goodput": _share(seconds["train"], without_queue_s),
    }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole > 0 else None


def by_rank(run: RunDirectory) -> list[dict[str, Any]]:
    """Return progress, speed and account of each rank of the newest attempt, one row per rank."""
    rows = []
    beats = run.heartbeats()
    newest = max((beat.attempt for beat in beats.values()), default=0)
    for rank, beat in beats.items():
        if beat.attempt != newest:  # an earlier attempt had more ranks
            continue
        kept = ("host", "device", "attempt", "step", "phase", "own_s", "data_s", "forward_s", "batch_s")
        accounts = ledger(run, rank=rank)
        rows.append(
            {
                "rank": rank,
                **{key: getattr(beat, key) for key in kept},
                "seconds": accounts["seconds"] if accounts else None,
            }
        )
    return rows


@dataclass(frozen=True)
class AttemptTime:
    """The time of one attempt."""

    attempt: int
    began: float
    """Seconds since 1970."""
    spent: Mapping[str, float]
    """Seconds by phase."""
    shares: Mapping[str, Mapping[str, float]]
    """By phase that is more than one class, the share of each: `train`, and the phase in which the attempt hung."""

    def by_class(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Return an amount by phase, such as seconds, as an amount by class."""
        classes: dict[str, float] = {}
        for phase, amount in amounts.items():
            for name, share in self.shares.get(phase, {_class_of(phase): 1.0}).items():
                classes[name] = classes.get(name, 0.0) + amount * share
        return classes


def _class_of(phase: str) -> str:
    """Return the class of a phase. The final ones (finished, failed, ...) last until the process exits."""
    return phase if phase in CLASSES else "finish"


def by_attempt(run: RunDirectory, events: Sequence[Event], rank: int = 0) -> list[AttemptTime]:
    """Return the time of each attempt that has a heartbeat of this rank, oldest first."""
    newest = run.heartbeat(rank)
    beats = [*run.past_heartbeats(rank), *([newest] if newest else [])]
    hangs = [event for event in events if isinstance(event, Hang)]
    attempts: list[AttemptTime] = []
    furthest: int | None = None
    for beat in sorted(beats, key=lambda beat: beat.began or 0.0):
        if beat.spent is None or beat.began is None:
            continue
        furthest = beat.first_step if furthest is None else furthest
        hang_s = sum(event.still_s for event in hangs if event.attempt == beat.attempt)
        attempts.append(AttemptTime(beat.attempt, beat.began, beat.spent, _shares(beat, furthest, hang_s)))
        furthest = max(furthest, beat.step)
    return attempts


def _shares(beat: HeartbeatRecord, furthest: int, hang_s: float) -> dict[str, dict[str, float]]:
    """Return the shares of each phase that has several; `furthest`: the last step that attempts before had reached.

    The ranks are killed in the phase in which they hang: it is that of the last heartbeat, unless a rank has failed
    because of the hang, which is then taken to have been in `train`.
    """
    steps = beat.step - beat.first_step
    again = max(0, min(beat.step, furthest) - beat.first_step) / steps if steps > 0 else 0.0
    shares = {"train": {"train": 1 - again, "redone": again}}
    phase = "train" if beat.phase in ("failed", "hung") else beat.phase
    phase_s = (beat.spent or {}).get(phase, 0.0)
    hung = min(1.0, hang_s / phase_s) if phase_s > 0 else 0.0
    if hung:
        parts = shares.get(phase, {_class_of(phase): 1.0})
        shares[phase] = {**{name: share * (1 - hung) for name, share in parts.items()}, "hang": hung}
    return shares
