"""Decide what a sweep does next, as pure functions of its spec and the state of its trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.units import three_digits
from trainer.sweeps.points import points
from trainer.sweeps.progress import TrialView
from trainer.sweeps.records import ADAPTIVE, Spec, Trial
from trainer.sweeps.space import overrides_of

if TYPE_CHECKING:
    from trainer.sweeps.custom import CustomSpace, CustomTrial


@dataclass(frozen=True)
class Next:
    """What a process that is free does next: a trial to claim, a trial to ask for, or neither."""

    claim: int | None = None
    ask: int | None = None
    """Number of the trial whose point is to be decided first."""
    why_not: str = ""
    """Why no further trial starts now; empty if there is one, or all are done."""


def next_step(spec: Spec, found: Sequence[TrialView], *, is_stopped: bool, now: float | None = None) -> Next:
    """Return what a free process does next.

    A trial that has lost its process comes first, then the first one that nobody has claimed, then a new point.

    Args:
        spec: The spec.
        found: Every decided trial.
        is_stopped: Whether the sweep was asked to stop.
        now: Seconds since 1970.
    """
    reason = why_stopped(spec, found, is_stopped=is_stopped, now=now)
    if reason:
        return Next(why_not=reason)
    free = [view for view in found if view.result is None and not view.is_alive]
    lost = [view for view in free if view.owner is not None]
    if lost or free:
        return Next(claim=(lost or free)[0].number)
    if spec.method not in ADAPTIVE or len(found) >= spec.trials:
        return Next()
    number = len(found)
    if spec.generation is not None:
        earlier = found[: number - number % spec.generation]
        if any(view.result is None for view in earlier):
            return Next(why_not="the next generation waits for the results of this one")
    return Next(ask=number)


def claimable(found: Sequence[TrialView]) -> list[int]:
    """Return the trials that a process may claim, in the order of `next_step`."""
    free = [view for view in found if view.result is None and not view.is_alive]
    return [view.number for view in sorted(free, key=lambda view: (view.owner is None, view.number))]


def why_stopped(spec: Spec, found: Sequence[TrialView], *, is_stopped: bool = False, now: float | None = None) -> str:
    """Return why the sweep starts no further trial, although some are left; empty if it does."""
    results = [view.result for view in found if view.result is not None]
    if len(results) >= spec.trials:
        return ""
    if is_stopped:
        return "it was stopped"
    if spec.until is not None and (time.time() if now is None else now) >= spec.until:
        return "sweep.until has passed"
    limits = (
        ("max_gpu_hours", spec.max_gpu_hours, spec.planned_gpu_hours, lambda view: view.gpu_hours),
        ("max_cost", spec.max_cost, spec.planned_cost, lambda view: view.cost),
    )
    for key, limit, plan, amount in limits:
        if limit is not None and (reason := _why_beyond(f"sweep.{key}={limit:g}", limit, plan, found, amount)):
            return reason
    failed = sum(one.state == "failed" for one in results)
    if spec.max_failure_rate is not None and failed > spec.max_failure_rate * len(results):
        return f"{failed} of {len(results)} ended trials failed (sweep.max_failure_rate={spec.max_failure_rate:g})"
    return ""


def _why_beyond(
    name: str, limit: float, plan: float | None, found: Sequence[TrialView], amount: Callable[[TrialView], float]
) -> str:
    """Return why another trial would exceed a limit; empty if it would not, as far as is known.

    A trial is expected to take the mean of the finished ones, else what the plan says; those that run, too.
    """
    used = sum(amount(view) for view in found)
    if used >= limit:
        return f"its trials have used {three_digits(used)} of {name}"
    finished = [amount(view) for view in found if view.result is not None and view.result.state == "finished"]
    each = sum(finished) / len(finished) if finished else plan or 0.0
    left = sum(max(0.0, each - amount(view)) for view in found if view.is_alive)
    if used + left + each <= limit:
        return ""
    running = f", those that run may use {three_digits(left)} more" if left else ""
    return f"its trials have used {three_digits(used)}{running}, and another one {three_digits(each)}: beyond {name}"


def planned(spec: Spec, first: int, count: int, custom: CustomSpace | None = None) -> list[Trial]:
    """Return the trials `first` to `first + count` of a search that does not depend on results.

    Args:
        spec: The spec.
        first: Number of the first trial.
        count: Number of trials.
        custom: Adds parameters to each.

    Raises:
        UserError: The user's function raises an exception.
    """
    values = points(spec.parameters, spec.method, spec.seed, first, count)
    return [trial_of(spec, number, one, custom) for number, one in enumerate(values, start=first)]


def trial_of(spec: Spec, number: int, values: dict[str, str], custom: CustomSpace | None = None) -> Trial:
    """Return the trial of a point, to which `custom` adds values that are drawn at random."""
    if custom is None:
        return Trial(number=number, values=values, overrides=overrides_of(spec.fixed, values))
    from trainer.sweeps.custom import drawn

    added = custom.extended(number, values, drawn(spec.seed, number))
    return extended(spec, number, values, added)


def extended(spec: Spec, number: int, values: dict[str, str], added: CustomTrial) -> Trial:
    """Return the trial of a point with the parameters that were added to it."""
    whole = {**values, **added.added}
    return Trial(number=number, values=whole, parameters=added.parameters, overrides=overrides_of(spec.fixed, whole))


def added(spec: Spec, existing: Sequence[Trial], wanted: Sequence[Trial]) -> list[Trial]:
    """Return the trials of a changed grid that the sweep does not have yet, numbered after those that it has."""
    known = {tuple(sorted(one.values.items())) for one in existing}
    new = [one for one in wanted if tuple(sorted(one.values.items())) not in known]
    first = len(existing)
    return [Trial(number=first + index, values=one.values, overrides=one.overrides) for index, one in enumerate(new)]
