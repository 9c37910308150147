"""`trainer best METRIC`: the run with the best value of a metric, and its checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.checkpoint import commit
from trainer.cli.common import number, table
from trainer.cli.ls import add_where, positive, report_problems
from trainer.cli.options import add_output_options, make_parser
from trainer.core.errors import DONE, UserError
from trainer.core.near import did_you_mean, listed
from trainer.core.text import one_line
from trainer.launch.jobs import states_of_jobs
from trainer.runs.columns import as_number, is_metric, metrics_of, mode_of
from trainer.runs.facts import mapping
from trainer.runs.index import Index
from trainer.runs.registry import runs_dir_from, shortest
from trainer.runs.row import Row
from trainer.runs.where import parse, select

_DESCRIPTION = (
    "Show the run with the best value of a metric over all its steps (or of trainer evaluate), the step, and the "
    "checkpoint of that step, or the best one that was kept. Lower or higher is better as in checkpoint.mode of the "
    "runs, else by the name of the metric."
)


@dataclass(frozen=True)
class Best:
    """The best value of a metric in one run."""

    run: str
    """Name of the run directory."""
    path: str
    metric: str
    mode: str
    value: float
    step: int
    checkpoint: str | None = None
    """The checkpoint of that step, else the best one that is on disk; None: none has a value of this metric."""
    checkpoint_step: int | None = None
    checkpoint_value: float | None = None


def main(argv: list[str]) -> int:
    """Run `trainer best` and return the exit code."""
    parser = make_parser("best", _DESCRIPTION, "trainer best val/acc", "trainer best val/acc -n 5 --where model=mlp")
    parser.add_argument("metric", metavar="METRIC", help="a metric as it was logged, such as val/acc")
    parser.add_argument("--mode", choices=("min", "max"), help="whether lower or higher is better")
    parser.add_argument(
        "-n", "--limit", type=positive, default=1, metavar="N", help="show the best N runs (default: 1)"
    )
    add_where(parser)
    add_output_options(parser)
    options = parser.parse_args(argv)
    index = Index(runs_dir_from(options.runs_dir), states_of_jobs)
    index.refresh()
    report_problems(index)
    conditions = [condition for text in options.where for condition in parse(text)]
    rows = select(index.rows(), conditions)
    by_folder = {row.folder: row for row in rows}
    best = best_runs(rows, options.metric, options.mode)[: options.limit]
    found = [with_checkpoint(one, by_folder[one.path]) for one in best]
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        print("\n".join(_text(found, options)))
    return DONE


def best_runs(rows: Sequence[Row], metric: str, mode: str | None = None) -> list[Best]:
    """Return the best value of each run that has the metric, the best run first; of equal ones the older one.

    Raises:
        UserError: No run has the metric, or it is not known whether lower or higher is better.
    """
    if not is_metric(rows, metric) or not any(_values(row, metric) for row in rows):
        known = metrics_of(rows)
        raise UserError(
            f"no run has a value of {metric}", f"{did_you_mean(metric, known)}metrics of the runs: {listed(known)}"
        )
    modes = {mode} if mode else {mode_of(row, metric) for row in rows if _values(row, metric)}
    if len(modes) > 1 or None in modes:
        problem = "the runs disagree" if len(modes - {None}) > 1 else "it is not known"
        raise UserError(f"{problem} whether a lower or a higher {metric} is better", "add --mode min, or --mode max")
    (chosen,) = [str(one) for one in modes]
    found = [best for row in rows if (best := _best_of(row, metric, chosen)) is not None]
    return sorted(found, key=lambda best: best.value if chosen == "min" else -best.value)


def _best_of(row: Row, metric: str, mode: str) -> Best | None:
    values = _values(row, metric)
    if not values:
        return None
    value, step = min(values, key=lambda one: (_sign(mode) * one[0], one[1]))
    return Best(run=Path(row.folder).name, path=row.folder, metric=metric, mode=mode, value=value, step=step)


def with_checkpoint(best: Best, row: Row) -> Best:
    """Add the checkpoint of the best step, else the best one that is on disk and has a value of the metric."""
    kept: list[tuple[float, int, str]] = []
    for one in row.facts["checkpoints"]:
        value = best.value if one["step"] == best.step else as_number(mapping(one["metrics"]).get(best.metric))
        if value is not None and commit.is_committed(Path(one["path"])):
            kept.append((value, one["step"], one["path"]))
    if not kept:
        return best
    value, step, path = min(kept, key=lambda one: (one[1] != best.step, _sign(best.mode) * one[0]))
    return replace(best, checkpoint=path, checkpoint_step=step, checkpoint_value=value)


def _sign(mode: str) -> float:
    return 1.0 if mode == "min" else -1.0


def _values(row: Row, metric: str) -> list[tuple[float, int]]:
    """Return the extremes of the logged values, and the evaluated values, each with its step."""
    found: list[tuple[float, int]] = []
    if metric in row.metrics and (logged := row.ranges.get(metric)) is not None:
        found = [best for mode in ("min", "max") if (best := logged.best(mode)) is not None]
    for one in row.facts["evaluations"]:
        value = as_number(mapping(one["metrics"]).get(metric))
        if value is not None and value == value:
            found.append((value, one["step"]))
    return found


def _text(found: list[Best], options: argparse.Namespace) -> list[str]:
    if options.limit > 1:
        rows = [[one.run, number(one.value), str(one.step), _checkpoint(one)] for one in found]
        return [table(rows, ["RUN", one_line(options.metric), "STEP", "CHECKPOINT"])]
    best = found[0]
    return [
        f"{one_line(best.metric)} {number(best.value)} at step {best.step}",
        f"  run         {one_line(best.run)}",
        f"  checkpoint  {one_line(_checkpoint(best))}",
    ]


def _checkpoint(best: Best) -> str:
    if best.checkpoint is None:
        return "none was kept"
    path = shortest(Path(best.checkpoint))
    return (
        path
        if best.checkpoint_step == best.step
        else f"{path} ({number(best.checkpoint_value)}; none of step {best.step} was kept)"
    )
