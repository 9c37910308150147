"""Advice for a run that failed: sentences with commands that can be copied to a shell."""

from __future__ import annotations

import re
import time

from trainer.core.files import no_space_on
from trainer.launch.follow import fit_again
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome
from trainer.runs.registry import reference_to

_STALLED_S = 60.0
_REMEDIES = (
    (
        r"out of memory",
        "use a smaller micro-batch; the global batch size stays the same",
        "resilience.on_oom=halve",
    ),
    (
        r"No space left|[Dd]isk quota|Not enough space|No free inodes",
        "the disk is full: free some space, or keep fewer checkpoints",
        "checkpoint.keep_last=1",
    ),
    (
        r"no newer checkpoint",
        "the attempts fail before their first checkpoint: save one earlier",
        "checkpoint.every_minutes=5",
    ),
    (
        r"NaN|infinite|not finite",
        "skip a single bad batch; if there are many, the learning rate or the precision is the likely cause",
        "resilience.on_nonfinite=skip",
    ),
    (r"loss spike|jumped", "skip the batches that cause the loss spike", "resilience.on_spike=skip"),
    (
        r"did not move for .* are allowed|no progress for",
        "if a step may take longer than this limit, raise it",
        "resilience.hang_after_s=600",
    ),
)
"""Pattern of a reason in the words of this or an earlier version, advice, and the override that follows it."""
_UNEVEN = re.compile(
    r"did not move|no progress|had not after|did not stop|after a request to stop|has not (come to|reached|entered)"
    r"|connection closed|monitored.?barrier",
    re.I,
)
"""Reasons that may come from ranks with unequal numbers of batches."""
_LOST_NODE = re.compile(r"\b(was|were) lost\b|\blost node")


def advice(run: RunDirectory, reason: str, outcome: AttemptOutcome | None) -> list[str]:
    """Return sentences on what to do about `reason`, each with a complete command.

    Args:
        run: The run.
        reason: Why its last attempt ended.
        outcome: How that attempt ended; None if that was not recorded.
    """
    if outcome is not None and outcome.mend:
        return [f"resuming would fail the same way; fix the cause, then run: {fit_again(run, 'trainer')}"]
    full = no_space_on(run.path) if outcome is None else None
    if full and full not in reason:
        reason = f"{reason}; {full}"
    if _LOST_NODE.search(reason):
        return ["not caused by your code: the requeued job resumes without the lost node"]
    sentences = [
        f"{text}: trainer resume {reference_to(run)} {override}"
        for pattern, text, override in _REMEDIES
        if re.search(pattern, reason)
    ]
    if _UNEVEN.search(reason) and (uneven := _unequal_ranks(run)):
        sentences.insert(0, uneven)
    return sentences


def stalled(run: RunDirectory) -> str | None:
    """Return the positions of the ranks of a run if they have waited for each other for a minute, else None."""
    last_progress = max((beat.moved or 0.0 for beat in run.heartbeats().values()), default=0.0)
    return _unequal_ranks(run) if time.time() - last_progress > _STALLED_S else None


def _unequal_ranks(run: RunDirectory) -> str | None:
    """Return the positions of the ranks if they differ: a rank that had fewer batches has left the loop."""
    heartbeats = run.heartbeats()
    if len({(beat.step, beat.phase) for beat in heartbeats.values()}) < 2:
        return None
    positions = ", ".join(f"rank {rank} at step {beat.step} ({beat.phase})" for rank, beat in heartbeats.items())
    return (
        f"the ranks are at different positions: {positions}. If a data loader of yours gives them unequal numbers of "
        "batches, set trainer.limit_train_batches to the smallest number, or yield the same number on each rank"
    )
