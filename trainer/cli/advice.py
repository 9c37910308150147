"""What helps a run that ended badly, as commands that can be typed as they stand."""

from __future__ import annotations

import re
import time
from typing import Any

from trainer.core.files import read_live
from trainer.launch.follow import fit_again
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import reference_to

_STILL_S = 60.0
_HELPS = (
    (
        r"out of memory",
        "a smaller micro-batch needs less memory, and the global batch stays as it is",
        "resilience.on_oom=halve",
    ),
    (r"No space left|Disk quota", "the disk is full: make room, or keep fewer checkpoints", "checkpoint.keep_last=1"),
    (
        r"left no newer checkpoint",
        "the attempts end before their first checkpoint: write one sooner",
        "checkpoint.every_minutes=5",
    ),
    (
        r"NaN|infinite|not finite",
        "one bad batch can be left out; of many the learning rate or the precision is the cause",
        "resilience.on_nonfinite=skip",
    ),
    (r"loss spike|jumped", "the batches that made the loss jump can be left out", "resilience.on_spike=skip"),
    (
        r"did not move for .* are allowed|no progress for",
        "steps that may take longer than that are allowed more time",
        "resilience.hang_after_s=600",
    ),
)
"""What a reason says, to what helps and the override for `trainer resume` that does it."""
_UNEVEN = re.compile(
    r"did not move|it had not after|no progress|has not come to|Connection closed|monitored.?barrier", re.I
)


def advice(run: RunDirectory, reason: str, record: dict[str, Any]) -> list[str]:
    """Sentences on what to do about `reason`, the commands in them complete. `record`: the end of the last attempt."""
    if record.get("mend"):
        return [f"a resume would fail in the same way: mend it, then: {fit_again(run, 'trainer')}"]
    if "was lost" in reason:
        return ["nothing of yours: a requeued job goes on without the node"]
    told = [
        f"{text}: trainer resume {reference_to(run)} {override}"
        for pattern, text, override in _HELPS
        if re.search(pattern, reason)
    ]
    if _UNEVEN.search(reason) and (uneven := _unequal_ranks(run)):
        told.insert(0, uneven)
    return told


def standing_still(run: RunDirectory) -> str | None:
    """Of a run whose processes live: ranks that wait for each other at different places for a minute."""
    beats = _beats(run).values()
    moved = max((float(beat.get("moved") or 0) for beat in beats), default=0.0)
    return _unequal_ranks(run) if time.time() - moved > _STILL_S else None


def _beats(run: RunDirectory) -> dict[str, dict[str, Any]]:
    return {path.stem: read_live(path) for path in sorted(run.live_dir.glob("rank-*.json"))}


def _unequal_ranks(run: RunDirectory) -> str | None:
    """A rank that has left its loop while others go on: they had unequal numbers of batches."""
    beats = _beats(run)
    phases = {name: str(beat.get("phase")) for name, beat in beats.items()}
    steps = {name: int(beat.get("step") or 0) for name, beat in beats.items()}
    if len(beats) < 2 or (len(set(steps.values())) == 1 and len(set(phases.values())) == 1):
        return None
    stands = ", ".join(f"{name.replace('-', ' ')} at step {steps[name]} ({phases[name]})" for name in beats)
    return (
        f"the ranks stand at different places: {stands}. If a loader of yours gives them unequal numbers of batches, "
        "set trainer.limit_train_batches to the smallest number, or have each rank yield as many"
    )
