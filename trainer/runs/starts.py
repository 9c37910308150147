"""The time to the first step of each attempt, by part."""

from __future__ import annotations

from typing import Any

from trainer.runs.directory import RunDirectory
from trainer.runs.events import Created, FirstStep


def starts(run: RunDirectory) -> list[dict[str, Any]]:
    """Return attempt, first step, seconds until it ended, and these by part, of each attempt that got so far.

    The time of the first attempt counts from the command, on a cluster of its own from the start of its first node;
    that of an attempt that torchrun restarts from the start of its ranks.
    """
    created = next(iter(run.events_of(Created)), None)
    found: list[dict[str, Any]] = []
    for event in run.events_of(FirstStep):
        seconds = dict(event.seconds)
        if not found and created is not None and created.compose_s is not None and run.launch().cluster == "local":
            before = {"compose": created.compose_s, "snapshot": created.snapshot_s or 0.0}
            seconds = before | {"launch": round(max(0.0, event.began - created.time), 3)} | seconds
        total_s = round(sum(seconds.values()), 3)
        found.append({"attempt": event.attempt, "step": event.step, "total_s": total_s, "seconds": seconds})
    return found
