"""What `trainer sweep status`, `best` and `ls` print: the trials of a sweep as rows, lines, JSON and CSV."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from typing import Any

from trainer.cli.common import duration, number, table
from trainer.core.text import one_line
from trainer.sweeps.analysis import Row, Table
from trainer.sweeps.decide import why_stopped
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import TrialView
from trainer.sweeps.records import Spec

_MOST_ROWS = 40
ORDER = ("running", "starting", "finished", "pruned", "failed", "stopped", "interrupted", "waiting", "not decided")


def counts(spec: Spec, found: list[TrialView]) -> dict[str, int]:
    """Return the number of trials by state, in a fixed order, without states that none is in."""
    counted = Counter(view.state for view in found)
    counted["not decided"] = max(0, spec.trials - len(found))
    return {state: counted[state] for state in ORDER if counted[state]}


def headline(sweep: SweepDirectory, spec: Spec, found: list[TrialView]) -> list[str]:
    """Return the state of the sweep in one or two lines."""
    states = ", ".join(f"{count} {state}" for state, count in counts(spec, found).items())
    lines = [f"{sweep.path.name}: {spec.method}, {spec.trials} trials: {states}"]
    reason = why_stopped(spec, found, is_stopped=sweep.stop_request.exists())
    if reason:
        lines.append(f"no further trial starts: {reason}")
    return lines


def text(sweep: SweepDirectory, spec: Spec, found: list[TrialView], rows: Table, *, everything: bool) -> str:
    """Return the status: the counts, the best trials first, the cause of each failure."""
    ordered = rows.ranked() + [row for row in rows.rows if row.state not in ("finished", "pruned") or not row.values]
    ordered = list(dict.fromkeys(ordered, None))
    shown = ordered if everything else [row for row in ordered if row.state != "waiting"][:_MOST_ROWS]
    header = ["TRIAL", "STATE", *[name.upper() for name in rows.metrics], *rows.parameters, "RUN", "WHY"]
    cells = [
        [
            str(row.number),
            row.state,
            *([number(value) for value in row.values] or [""] * len(rows.metrics)),
            *(row.parameters.get(key, "") for key in rows.parameters),
            row.run_name,
            row.reason,
        ]
        for row in shown
    ]
    lines = headline(sweep, spec, found)
    if cells:
        lines.append(table(cells, [one_line(name) for name in header]))
    left = len(ordered) - len(shown)
    if left and not everything:
        lines.append(f"and {left} more; --all shows them")
    failed = [row for row in rows.rows if row.state == "failed"]
    lines += [f"trial {row.number} failed: {one_line(row.reason)}" for row in failed[:3]]
    return "\n".join(lines)


def as_json(sweep: SweepDirectory, spec: Spec, found: list[TrialView], rows: Table) -> dict[str, Any]:
    """Return the status for scripts."""
    return {
        "id": sweep.id,
        "name": sweep.path.name,
        "path": str(sweep.path),
        "method": spec.method,
        "trials": spec.trials,
        "counts": counts(spec, found),
        "is_over": is_over(spec, found),
        "stopped": why_stopped(spec, found, is_stopped=sweep.stop_request.exists()) or None,
        "metrics": rows.metrics,
        "directions": rows.directions,
        "parameters": rows.parameters,
        "gpu_hours": sum(row.gpu_hours for row in rows.rows),
        "best": ((best := rows.ranked()[:1]) and row_json(best[0])) or None,
        "rows": [row_json(row) for row in rows.rows],
    }


def row_json(row: Row) -> dict[str, Any]:
    """Return a trial for scripts."""
    return {
        "trial": row.number,
        "state": row.state,
        "values": list(row.values),
        "parameters": row.parameters,
        "step": row.step,
        "run": row.run_name or None,
        "path": row.run,
        "reason": row.reason or None,
        "gpu_hours": row.gpu_hours,
        "hours": row.hours,
    }


def as_csv(rows: Table) -> str:
    """Return the trials as CSV with a header. A text that a spreadsheet would take for a formula is quoted by `'`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", *rows.metrics, *rows.parameters, "step", "run", "hours", "gpu_hours", "reason"])
    for row in rows.rows:
        values = [repr(value) for value in row.values] or [""] * len(rows.metrics)
        parameters = [_cell(row.parameters.get(key, "")) for key in rows.parameters]
        ending = [row.run_name, f"{row.hours:.6f}", f"{row.gpu_hours:.6f}", _cell(one_line(row.reason))]
        writer.writerow(
            [row.number, row.state, *values, *parameters, row.step if row.step is not None else "", *ending]
        )
    return out.getvalue()


def _cell(value: str) -> str:
    try:
        float(value)
    except ValueError:
        return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t") else value
    return value


def is_over(spec: Spec, found: list[TrialView]) -> bool:
    """Return whether every trial of the sweep has a result."""
    return len(found) >= spec.trials and all(view.result is not None for view in found)


def sweep_row(sweep: SweepDirectory, spec: Spec, found: list[TrialView]) -> list[str]:
    """Return the row of a sweep in `trainer sweep ls`."""
    done = sum(view.result is not None for view in found)
    states = ", ".join(f"{count} {state}" for state, count in counts(spec, found).items())
    created = (sweep.path / "spec.json").stat().st_mtime
    return [sweep.id, spec.name, spec.method, f"{done}/{spec.trials}", duration(time.time() - created), states]
