"""The state of every trial of a sweep, from its files and from which processes and jobs live."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.core import processes
from trainer.core.files import read_text
from trainer.core.records import BadRecord, skip
from trainer.runs.directory import RunDirectory
from trainer.runs.state import is_alive
from trainer.sweeps.directory import Names, SweepDirectory
from trainer.sweeps.outcome import final_outcome, open_run, result_of, spent
from trainer.sweeps.records import Owner, Result, Spec, Trial

MOST_OWNERS = 10
"""Processes that may die on a trial before it counts as failed."""
SWEEP_STOP = "trainer sweep stop"
"""The text of `control/stop` of a run that is stopped with its sweep, and resumed with it."""
PRUNED = "pruned by its sweep"
"""The text of `control/stop` of a run that is pruned."""
_CLAIM_S = 900.0
"""On another host, an owner that has not begun a run since so long is dead."""
_GONE = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


@dataclass
class TrialView:
    """A trial, as its files show it."""

    number: int
    names: Names
    result: Result | None = None
    owner: Owner | None = None
    """The newest owner of this round."""
    run: RunDirectory | None = None
    """The newest run of this round."""
    is_alive: bool = False
    """Whether the owner trains, or is about to."""
    gpu_hours: float = 0.0
    """What all its runs have used so far, where the sweep has a limit; else those of its result."""
    cost: float = 0.0
    _trial: Trial | None = field(default=None, repr=False)

    @property
    def state(self) -> str:
        """The state in one word."""
        if self.result is not None:
            return self.result.state
        if self.is_alive:
            return "running" if self.run is not None and self.run.exists() else "starting"
        return "interrupted" if self.owner is not None else "waiting"

    def trial(self, sweep: SweepDirectory) -> Trial:
        """Return its point, read once."""
        if self._trial is None:
            self._trial = sweep.trial(self.number)
        return self._trial


def views(
    sweep: SweepDirectory, slurm_states: Mapping[str, str] | None, ended: frozenset[int] = frozenset()
) -> list[TrialView]:
    """Return every trial that is decided, by number.

    Args:
        sweep: The sweep.
        slurm_states: SLURM job id to state; a job that it lacks is gone. None: SLURM was not asked, and its jobs count
            as alive.
        ended: Trials whose owner says that it has ended.
    """
    found = []
    for number, names in sweep.names().items():
        try:
            found.append(_view(sweep, number, names, slurm_states, number in ended))
        except BadRecord as error:
            skip(error)
    return found


def one_view(sweep: SweepDirectory, number: int) -> TrialView:
    """Return a trial whose owner is this process, as it was left by the earlier ones."""
    return _view(sweep, number, sweep.names()[number], None, ended=True)


def _view(
    sweep: SweepDirectory, number: int, names: Names, slurm_states: Mapping[str, str] | None, ended: bool
) -> TrialView:
    view = TrialView(number, names)
    if names.is_over:
        view.result = sweep.result(number, names.retries)
        return view
    first = sweep.retry(number, names.retries).first_owner if names.retries else 0
    if names.owners > first:
        view.owner = sweep.owner(number, names.owners - 1)
    mine = [index for index in names.runs if index >= first]
    if mine:
        record = sweep.run_of(number, mine[-1])
        view.run = open_run(record.path) if record else None
    view.is_alive = view.owner is not None and not ended and _lives(view, mine, slurm_states)
    return view


def _lives(view: TrialView, runs: list[int], slurm_states: Mapping[str, str] | None) -> bool:
    owner = view.owner
    assert owner is not None
    if owner.slurm_job_id is not None:
        return slurm_states is None or slurm_states.get(owner.slurm_job_id, _GONE[0]) not in _GONE
    if view.run is not None and view.run.launch_path.exists() and is_alive(view.run, view.run.launch()):
        return True  # also if it was resumed by hand
    if owner.host == socket.gethostname() and owner.boot_id == processes.boot_id():
        return processes.is_alive(owner.pid, owner.pid_started)
    if owner.host == socket.gethostname():  # before this boot
        return False
    if view.run is not None and runs[-1] == owner.number and view.run.launch_path.exists():
        return False
    return time.time() - owner.time < _CLAIM_S


def settle(sweep: SweepDirectory, spec: Spec, found: list[TrialView]) -> list[TrialView]:
    """Record the result of each trial whose run has ended, and return the trials as they are then.

    Any process may do so, at any time, together with others: a result is linked once.
    """
    for view in found:
        if view.result is not None or view.owner is None:
            continue
        try:
            result = _ended(sweep, spec, view)
        except BadRecord as error:
            skip(error)
            continue
        if result is not None:
            sweep.add_result(view.number, view.names.retries, result)
            view.result = sweep.result(view.number, view.names.retries)
            view.is_alive = False
    for view in found:
        view.gpu_hours, view.cost = _spent(sweep, spec, view)
    return found


def _spent(sweep: SweepDirectory, spec: Spec, view: TrialView) -> tuple[float, float]:
    """Return the GPU hours and the cost of a trial, with the runs whose results were voided."""
    if view.result is not None and not view.names.retries:
        return view.result.gpu_hours, view.result.cost or 0.0
    if spec.max_gpu_hours is None and spec.max_cost is None:
        return 0.0, 0.0
    records = [sweep.run_of(view.number, index) for index in view.names.runs]
    paths = dict.fromkeys(record.path for record in records if record is not None)
    amounts = [spent(open_run(path), spec) for path in paths]
    return sum(hours for hours, _ in amounts), sum(cost for _, cost in amounts)


def _ended(sweep: SweepDirectory, spec: Spec, view: TrialView) -> Result | None:
    """Return the result of a trial; None while it may continue."""
    names, run = view.names, view.run
    first = sweep.retry(view.number, names.retries).first_owner if names.retries else 0
    record = sweep.run_of(view.number, names.runs[-1]) if run is not None and names.runs else None
    end = None
    if run is not None and record is not None:
        # An outcome before the newest launch is not the end: somebody has resumed the run.
        end = final_outcome(run, max(record.first_attempt, run.launch().attempt))
    if end is not None and names.runs[-1] != names.owners - 1:
        end = end if not view.is_alive and end.outcome in ("finished", "failed", "hung") else None
    if end is not None and end.outcome == "finished":
        return result_of(run, spec, "finished", "")
    if end is not None and end.outcome == "stopped":
        if names.retries in names.pruned:
            decision = sweep.prune(view.number, names.retries)
            return result_of(run, spec, "pruned", decision.reason if decision else "")
        return None if run is not None and _asked_by(run) == SWEEP_STOP else result_of(run, spec, "stopped", end.reason)
    if end is not None and end.outcome in ("failed", "hung"):
        return result_of(run, spec, "failed", end.reason, end.where)
    if end is not None and not view.is_alive and end.reason.endswith("cancelled by scancel"):
        return result_of(run, spec, "stopped", end.reason)
    if not view.is_alive and names.owners - first >= MOST_OWNERS:
        reason = f"its processes died {names.owners - first} times without recording why"
        return result_of(run, spec, "failed", reason)
    return None


def _asked_by(run: RunDirectory) -> str:
    try:
        return read_text(run.stop_request, errors="replace").strip()
    except OSError:
        return ""
