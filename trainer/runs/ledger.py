"""Where the time of a run went: every second of every attempt in one class, from a rank's heartbeats.

A heartbeat carries the seconds of its process by phase; what an attempt left behind is kept in
`live/attempt-NN-rank-R.json` when the next one begins. What lies between two attempts is `down`. The time that
steps wait for other ranks is in the steps.
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
"""`queue` ends when SLURM starts the job, at first and after each requeue; `start` is from then, or from the command,
to the first process (on SLURM with the preflight), and joining the others; `import` is once a launch, also where it is
done for all ranks of a node (`supervise/agent.py`); `build` has loading the checkpoint,
`first_step` compilation; `train` are the useful steps, `redone` those that an earlier attempt had done already; `data`
is waiting for a batch, in whatever step; `save` is how long the training stood still for checkpoints, which are written
behind its back; `finish` waits for the last of them and for the trackers."""


def ledger(run: RunDirectory, now: float | None = None, rank: int = 0) -> dict[str, Any] | None:
    """Seconds by class (`seconds`), their sum (`wall_s`), the share of useful steps (`effective`) and useful steps at
    the pace of this run over the wall time without the queue (`goodput`). `now`: the end where the run goes on.

    None before the first heartbeat of this rank.
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
        # Not until `time`: a clock that was set during the attempt has changed that, but not the seconds spent.
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
    """Of each rank of the newest attempt its place and pace, and where its time went; a row a rank."""
    rows = []
    beats = run.heartbeats()
    newest = max((beat.attempt for beat in beats.values()), default=0)
    for rank, beat in beats.items():
        if beat.attempt != newest:  # that attempt had more ranks
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
    """What a heartbeat says of the time of its attempt."""

    attempt: int
    began: float
    first_step: int
    step: int
    spent: dict[str, float]


def _beats(run: RunDirectory, rank: int) -> list[_Accounts]:
    """The last heartbeat of each attempt, by attempt."""
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
    """The time of one attempt. `furthest`: the step that the attempts before it had reached."""
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
        # The phases of an end (finished, failed, ...) last until the process is gone.
        seconds[phase if phase in CLASSES else "finish"] += value


def _hang_s(events: list[Event], attempt: int) -> float:
    return sum(event.still_s for event in events if isinstance(event, Hang) and event.attempt == attempt)
