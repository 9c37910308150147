"""The sweeps whose runs are in the roots, and the trials of one, as plain data. Reads only: it settles no result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.core.errors import TrainerError
from trainer.core.secrets import mask_inside
from trainer.dashboard.catalogue import key_of
from trainer.runs.directory import RunDirectory
from trainer.sweeps.analysis import importance, table_of
from trainer.sweeps.directory import SweepDirectory, all_sweeps, sweeps_dir_of
from trainer.sweeps.progress import views

_MOST_TRIALS = 5000


def sweeps_of(roots: Sequence[Path]) -> dict[str, SweepDirectory]:
    """Return the sweeps beside the folders of runs by their keys, newest first."""
    folders = [root.parent if RunDirectory(root).exists() else root for root in roots]
    found: dict[str, SweepDirectory] = {}
    for folder in dict.fromkeys(sweeps_dir_of(folder) for folder in folders):
        try:
            found |= {key_of(sweep.path): sweep for sweep in reversed(all_sweeps(folder))}
        except (OSError, TrainerError):  # a folder that cannot be read
            continue
    return found


def sweep_table(sweep: SweepDirectory) -> dict[str, Any]:
    """Return the trials of a sweep: parameters, values, state and the key of the run of each.

    Raises:
        TrainerError: The sweep is damaged.
    """
    spec = sweep.spec()
    table = table_of(sweep, spec, views(sweep, None)[:_MOST_TRIALS], live=True)
    rows = [
        {
            "number": row.number,
            "state": row.state,
            "parameters": row.parameters,
            "values": [value if math.isfinite(value) else None for value in row.values],
            "step": row.step,
            "run": key_of(Path(row.run)) if row.run else None,
            "name": row.run_name,
            "reason": row.reason,
        }
        for row in table.rows
    ]
    shown = {
        "name": sweep.name,
        "id": sweep.id,
        "method": spec.method,
        "planned": spec.trials,
        "metrics": table.metrics,
        "directions": list(table.directions),
        "parameters": table.parameters,
        "importance": importance(table),
        "trials": rows,
    }
    masked: dict[str, Any] = mask_inside(shown)
    return masked
