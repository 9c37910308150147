"""Advance a sweep by one decision: any process may, from any node, together with others, and be killed at any instant.

Every step first reads what is decided, then links one file. What a killed process has left undone, the next one does.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.core import processes
from trainer.core.errors import TrainerError, UserError
from trainer.runs.directory import RunDirectory
from trainer.sweeps import decide
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.outcome import directions_of, history, open_run
from trainer.sweeps.past import Past
from trainer.sweeps.progress import TrialView, one_view, settle, views
from trainer.sweeps.records import ADAPTIVE, Direction, Owner, Result, Spec, Trial
from trainer.sweeps.space import size

if TYPE_CHECKING:
    from trainer.sweeps.custom import CustomSpace


@dataclass(frozen=True)
class Claim:
    """A trial that this process trains."""

    spec: Spec
    trial: Trial
    owner: int
    """Number of the owner."""
    previous: RunDirectory | None
    """The run of an earlier owner, which is resumed."""


def acquire(
    sweep: SweepDirectory,
    *,
    slurm_states: Mapping[str, str] | None = None,
    ended: frozenset[int] = frozenset(),
    only: int | None = None,
    job: str | None = None,
) -> Claim | str:
    """Claim the next trial for this process.

    Args:
        sweep: The sweep.
        slurm_states: As in `views`.
        ended: Trials that this process has trained, which has ended.
        only: Claim this trial and no other.
        job: The SLURM job of this process, if the sweep runs on SLURM.

    Returns:
        The claim, or why there is none; an empty text if nothing is left to do.
    """
    while True:
        spec = sweep.spec()
        found = completed(sweep, spec, settle(sweep, spec, views(sweep, slurm_states, ended)))
        step = decide.next_step(spec, found, is_stopped=sweep.stop_request.exists())
        if step.ask is not None and only is None:
            ask(sweep, spec, found, step.ask)
            continue
        number = step.claim
        if only is not None and number is not None:
            number = only if only in decide.claimable(found) else None
        if number is None:
            return step.why_not
        claimed = _claim(sweep, spec, next(view for view in found if view.number == number), job)
        if claimed is not None:
            return claimed
        ended = ended - {number}  # somebody else has it now


def _claim(sweep: SweepDirectory, spec: Spec, view: TrialView, job: str | None) -> Claim | None:
    """Link this process as the next owner; None if another one was faster, or the trial has ended meanwhile.

    Once linked, the files of the earlier owners are read again: between the listing and the link the last one may have
    begun a run, or ended it, before it died.
    """
    number, index = view.number, view.names.owners
    if not sweep.add_owner(number, myself(index, job)):
        return None
    before = settle(sweep, spec, [one_view(sweep, number)])[0]
    if before.result is not None:
        return None
    return Claim(spec, view.trial(sweep), index, _to_resume(sweep, before))


def _to_resume(sweep: SweepDirectory, view: TrialView) -> RunDirectory | None:
    """Return the run of an earlier owner if it was launched; otherwise the trial gets a new run."""
    run = view.run
    names = view.names
    if run is None and names.retries and not sweep.retry(view.number, names.retries).fresh and names.runs:
        record = sweep.run_of(view.number, names.runs[-1])
        run = open_run(record.path) if record else None
    return run if run is not None and run.exists() and run.launch_path.exists() else None


def completed(sweep: SweepDirectory, spec: Spec, found: list[TrialView]) -> list[TrialView]:
    """Decide the trials of an extension whose process died after it had written the spec, and return all trials.

    Raises:
        UserError: The user's function raises an exception.
    """
    if spec.method in ADAPTIVE or len(found) >= spec.trials:
        return found
    known = set(sweep.names())
    if spec.method == "grid":
        wanted = decide.planned(spec, 0, size(spec.parameters) or 0)
        missing = decide.added(spec, [sweep.trial(number) for number in known], wanted)[: spec.trials - len(known)]
    else:
        custom = custom_of(sweep, spec)
        numbers = [number for number in range(spec.trials) if number not in known]
        missing = [one for number in numbers for one in decide.planned(spec, number, 1, custom)]
    if not missing:
        return found
    sweep.add_trials(missing)
    return sorted([*found, *(one_view(sweep, one.number) for one in missing)], key=lambda view: view.number)


def myself(number: int, job: str | None) -> Owner:
    """Return this process as an owner."""
    pid = os.getpid()
    return Owner(
        number=number,
        host=socket.gethostname(),
        boot_id=processes.boot_id(),
        pid=pid,
        pid_started=processes.started_ticks(pid),
        slurm_job_id=job,
        time=time.time(),
    )


def ask(sweep: SweepDirectory, spec: Spec, found: Sequence[TrialView], number: int) -> None:
    """Decide the point of a trial from the results of the earlier ones.

    Raises:
        EnvironmentFault: Optuna is not installed.
    """
    from trainer.sweeps.adaptive import suggest

    generation = spec.generation
    earlier = found if generation is None else found[: number - number % generation]
    past = [past_of(sweep, spec, view) for view in earlier]
    custom = custom_of(sweep, spec)
    try:
        sweep.add_trials([suggest(spec, past, directions(spec, found), number, custom)])
    except UserError as error:  # of the user's function: a failed trial, as if its training had failed
        # The result first: a trial without one could be trained.
        sweep.add_result(number, 0, Result(state="failed", reason=error.message, time=time.time()))
        sweep.add_trials([Trial(number=number, values={}, overrides=list(spec.fixed))])


def custom_of(sweep: SweepDirectory, spec: Spec) -> CustomSpace | None:
    """Return the function that adds parameters to the trials of a sweep; None if it has none."""
    if spec.custom_search_space is None:
        return None
    from trainer.sweeps.custom import CustomSpace

    folders = [sweep.path / folder for folder in spec.config_dirs]
    where = {"config_dirs": folders, "config_name": spec.config_name}
    return CustomSpace(spec.custom_search_space, spec.fixed, sweep.path / spec.code, **where)


def directions(spec: Spec, found: Sequence[TrialView]) -> list[Direction]:
    """Return the direction of each metric, from the results where the spec does not name them."""
    modes = [view.result.mode for view in found if view.result is not None and view.result.mode is not None]
    return directions_of(spec, modes[0] if modes else None)


def past_of(sweep: SweepDirectory, spec: Spec, view: TrialView) -> Past:
    """Return a trial as the searches see it."""
    result, trial = view.result, view.trial(sweep)
    values, added = trial.values, trial.parameters
    if result is None:
        return Past(view.number, values, None, is_over=False, added=added)
    pruned = result.state == "pruned"
    curve: Sequence[tuple[int, float]] = ()
    if pruned and result.run is not None and result.metric is not None:
        seen = history(open_run(result.run), result.metric)
        curve = [(index, value) for index, (_, value) in enumerate(seen, start=1)]
    objective = result.values if result.state in ("finished", "pruned") else None
    return Past(view.number, values, objective, curve=curve, pruned=pruned, added=added)


def fail(sweep: SweepDirectory, claim: Claim, error: TrainerError, run: RunDirectory | None = None) -> None:
    """Record that a trial could not be started."""
    names = sweep.names()[claim.trial.number]
    reason = f"{error.message}" + (f" ({error.fix})" if error.fix else "")
    result = Result(state="failed", reason=reason, run=str(run.path) if run else None, time=time.time())
    sweep.add_result(claim.trial.number, names.retries, result)


def revised(spec: Spec, **changes: object) -> Spec:
    """Return the next revision of a spec."""
    return replace(spec, revision=spec.revision + 1, **changes)  # type: ignore[arg-type]
