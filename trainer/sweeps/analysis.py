"""The trials of a sweep as data for tables and plots: the one source of status, dashboard and report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.outcome import directions_of, objective
from trainer.sweeps.progress import TrialView, settle, views
from trainer.sweeps.records import Direction, Parameter, Spec


@dataclass(frozen=True, eq=False)
class Row:
    """A trial."""

    number: int
    state: str
    parameters: dict[str, str]
    values: tuple[float, ...]
    """One for each metric; empty while there are none."""
    step: int | None
    run: str | None
    reason: str
    hours: float
    gpu_hours: float

    @property
    def run_name(self) -> str:
        """The name of the run's folder; empty without one."""
        return Path(self.run).name if self.run else ""


@dataclass(frozen=True)
class Table:
    """All trials of a sweep."""

    rows: list[Row]
    metrics: list[str]
    directions: list[Direction]
    parameters: list[str]
    """Keys of the parameters, in the order of the space."""
    space: list[Parameter]

    def ranked(self) -> list[Row]:
        """Return the finished and the pruned trials with a value, best first; of several metrics those not dominated.

        Ties are in the order of their numbers, so that the best trial does not depend on when trials ended.
        """
        valued = [row for row in self.rows if row.values and row.state in ("finished", "pruned")]
        signs = [-1 if one == "maximize" else 1 for one in self.directions]
        keys = {row.number: [sign * value for sign, value in zip(signs, row.values, strict=False)] for row in valued}
        if len(signs) > 1:
            valued = [row for row in valued if not any(_dominates(keys[o.number], keys[row.number]) for o in valued)]
        # A pruned trial was cut off: it can be no more than a candidate after those that were trained to the end.
        return sorted(valued, key=lambda row: (row.state == "pruned", keys[row.number], row.number))


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def table_of(sweep: SweepDirectory, spec: Spec, found: Sequence[TrialView], *, live: bool = False) -> Table:
    """Return the trials of a sweep.

    Args:
        sweep: The sweep.
        spec: Its spec.
        found: Its trials.
        live: Also read the values so far of trials that run.
    """
    rows, metric, mode = [], None, None
    space = {one.key: one for one in spec.parameters}
    for view in found:
        result = view.result
        if result is not None and result.metric is not None and metric is None:
            metric, mode = result.metric, result.mode
        values: Sequence[float] = (result.values or ()) if result is not None else ()
        step = result.step if result is not None else None
        if result is None and live and view.run is not None and view.run.exists():
            so_far = objective(view.run, spec)
            values, step = (so_far.values, so_far.step) if so_far is not None else ((), None)
        run = result.run if result is not None else str(view.run.path) if view.run is not None else None
        trial = view.trial(sweep)
        for one in trial.parameters:
            space.setdefault(one.key, one)
        rows.append(
            Row(
                number=view.number,
                state=view.state,
                parameters=trial.values,
                values=tuple(values),
                step=step,
                run=run,
                reason=result.reason if result is not None else "",
                hours=result.hours if result is not None else 0.0,
                gpu_hours=result.gpu_hours if result is not None else view.gpu_hours,
            )
        )
    metrics = list(spec.metric) or [metric or "value"]
    return Table(rows, metrics, directions_of(spec, mode), list(space), list(space.values()))


def read_table(sweep: SweepDirectory) -> Table:
    """Return the trials of a sweep from its files alone, without asking SLURM."""
    spec = sweep.spec()
    return table_of(sweep, spec, settle(sweep, spec, views(sweep, None)), live=True)


@dataclass(frozen=True)
class Slice:
    """The values of the first metric over one parameter."""

    key: str
    is_numeric: bool
    is_log: bool
    points: list[tuple[str, float, int]]
    """(value of the parameter, value of the metric, trial) of each finished trial."""


def slices(rows: Table) -> list[Slice]:
    """Return a slice for each parameter."""
    done = [row for row in rows.rows if row.state == "finished" and row.values]
    return [
        Slice(
            one.key,
            one.kind != "choice" or all(_is_number(choice) for choice in one.choices),
            one.log,
            [(row.parameters[one.key], row.values[0], row.number) for row in done if one.key in row.parameters],
        )
        for one in rows.space
    ]


def importance(rows: Table, bins: int = 4) -> dict[str, float]:
    """Return the share of the variance of the first metric that each parameter explains alone, largest first.

    The first-order effect of a functional ANOVA (Hutter et al. 2014, https://proceedings.mlr.press/v32/hutter14.html),
    estimated without a model: the variance of the means of groups with similar values of the parameter, corrected for
    chance (epsilon squared, Kelley 1935), over the total variance. Values of numeric parameters are grouped into `bins`
    of equal numbers. Without parameters that fewer than four finished trials have, or if all have the same value.
    """
    found: dict[str, float] = {}
    for one in slices(rows):
        if len(one.points) < 4:
            continue
        groups = _groups(one, bins)
        found[one.key] = _explained(list(groups.values()))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _groups(one: Slice, bins: int) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    distinct = {value for value, _, _ in one.points}
    if one.is_numeric and len(distinct) > bins:
        ordered = sorted(one.points, key=lambda point: float(point[0]))
        for index, (_, metric, _) in enumerate(ordered):
            groups.setdefault(str(index * bins // len(ordered)), []).append(metric)
        return groups
    for value, metric, _ in one.points:
        groups.setdefault(value, []).append(metric)
    return groups


def _explained(groups: list[list[float]]) -> float:
    values = [value for group in groups for value in group]
    mean = math.fsum(values) / len(values)
    total = math.fsum((value - mean) ** 2 for value in values)
    spare = len(values) - len(groups)
    if total == 0 or spare <= 0:
        return 0.0
    within = math.fsum((value - math.fsum(group) / len(group)) ** 2 for group in groups for value in group)
    between, noise = total - within, within / spare
    return max(0.0, (between - (len(groups) - 1) * noise) / total)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
