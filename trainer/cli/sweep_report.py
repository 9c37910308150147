"""What `trainer report --sweep` shows of a sweep."""

from __future__ import annotations

import math

from trainer.report import sweep as reported
from trainer.sweeps.analysis import importance, slices, table_of
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import views


def as_reported(sweep: SweepDirectory) -> reported.Sweep:
    """Return what the report of a sweep shows, with the values so far of trials that run; writes nothing."""
    spec = sweep.spec()
    table = table_of(sweep, spec, views(sweep, None), live=True)
    return reported.Sweep(
        title=f"{sweep.name} {sweep.id}",
        source=str(sweep.path),
        method=spec.method,
        planned=spec.trials,
        metric=table.metrics[0],
        is_lower_better=table.directions[0] != "maximize",
        axes=[reported.Axis(one.key, one.is_numeric, one.is_log) for one in slices(table)],
        trials=[
            reported.Trial(
                number=row.number,
                state=row.state,
                parameters=row.parameters,
                value=row.values[0] if row.values and math.isfinite(row.values[0]) else None,
                step=row.step,
                run=row.run_name,
                reason=row.reason,
            )
            for row in table.rows
        ],
        importance=importance(table),
    )
