"""Account for the time of a run: each second of each attempt is in one class.

A heartbeat has the seconds of its process by phase; the last one of an attempt is kept in `live/attempt-NN-rank-R.json`
when the next attempt begins. The time between two attempts is `down`. The time in which a step waits for other ranks
belongs to the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated, Created, Event, Hang

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
    beats = _beats(run, rank)
    if not beats:
        return None
    events = run.events()
    seconds = dict.fromkeys(CLASSES, 0.0)
    edge = next((event.time for event in events if isinstance(event, Created)), beats[0].began)
    first = edge
    allocated = {
        event.attempt: event.time if event.since is None else event.since
        for event in events
        if isinstance(event, Allocated) and event.event == "allocated"
    }
    furthest = beats[0].first_step
    for number, beat in enumerate(beats):
        until = max(edge, beat.began)
        start = min(until, max(edge, allocated.get(beat.attempt, edge)))
        seconds["queue"] += start - edge
        seconds["down" if number else "start"] += until - start
        _add(seconds, beat, furthest, _hang_s(events, beat.attempt))
        furthest = max(furthest, beat.step)
        # Not `time`: setting the clock during the attempt changes it, but not the seconds spent.
        edge = max(edge, beat.began + sum(beat.spent.values()))
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
class _Accounts:
    """The fields of a heartbeat that the account uses."""

    attempt: int
    began: float
    first_step: int
    step: int
    spent: dict[str, float]


def _beats(run: RunDirectory, rank: int) -> list[_Accounts]:
    """Return the last heartbeat of each attempt, by attempt."""
    newest = run.heartbeat(rank)
    return sorted(
        (
            _Accounts(beat.attempt, beat.began, beat.first_step, beat.step, beat.spent)
            for beat in [*run.past_heartbeats(rank), *([newest] if newest else [])]
            if beat.spent is not None and beat.began is not None
        ),
        key=lambda beat: beat.began,
    )


def _add(seconds: dict[str, float], beat: _Accounts, furthest: int, hang_s: float) -> None:
    """Add the time of one attempt to `seconds`. `furthest` is the last step that earlier attempts had reached."""
    spent = dict(beat.spent)
    trained_s = spent.pop("train", 0.0)
    hung_s = min(hang_s, trained_s)
    steps = beat.step - beat.first_step
    again = max(0, min(beat.step, furthest) - beat.first_step)
    redone_s = (trained_s - hung_s) * again / steps if steps > 0 else 0.0
    seconds["hang"] += hung_s
    seconds["redone"] += redone_s
    seconds["train"] += trained_s - hung_s - redone_s
    for phase, value in spent.items():
        # The final phases (finished, failed, ...) last until the process exits.
        seconds[phase if phase in CLASSES else "finish"] += value


def _hang_s(events: list[Event], attempt: int) -> float:
    return sum(event.still_s for event in events if isinstance(event, Hang) and event.attempt == attempt)
