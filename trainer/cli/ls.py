"""`trainer ls`: all runs here, with their true state."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from trainer.cli.common import age, number, parser_of, table
from trainer.core.errors import TrainerError
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs, runs_dir_from
from trainer.runs.state import STATES
from trainer.runs.summary import summary


def main(argv: list[str]) -> int:
    parser = parser_of("ls", "All runs, newest first, with their true state.", "trainer ls --state running", run=False)
    parser.add_argument("--state", choices=STATES, action="append", help="only these; may be repeated")
    parser.add_argument("-n", type=int, default=None, metavar="N", help="the newest N")
    options = parser.parse_args(argv)
    runs = all_runs(runs_dir_from(options.runs_dir))[::-1]
    jobs = states_of(runs)
    rows = [row for run in (runs if options.state else runs[: options.n]) if (row := _summary(run, jobs))]
    if options.state:
        rows = [row for row in rows if row["state"] in options.state][: options.n]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"no runs in {runs_dir_from(options.runs_dir)}; trainer fit starts one")
    else:
        print(table([_row(row) for row in rows], ["ID", "NAME", "STATE", "STEP", "BEST", "AGE", "STRATEGY", "WHERE"]))
    return 0


def _summary(run: RunDirectory, jobs: Mapping[str, str] | None) -> dict[str, Any] | None:
    """Null, and a line on stderr, for one that is damaged: the others are wanted all the same."""
    try:
        return summary(run, jobs)
    except (TrainerError, OSError, KeyError, TypeError, ValueError) as error:
        reason = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        print(f"trainer: {run.path.name} is left out: {reason}", file=sys.stderr)
        return None


def _row(row: dict[str, Any]) -> list[str]:
    step = "" if row["step"] is None else str(row["step"]) + (f"/{row['max_steps']}" if row["max_steps"] else "")
    best = f"{row['best']['metric']} {number(row['best']['value'])}" if row["best"] else ""
    where = f"slurm {row['slurm_job_id']}" if row["slurm_job_id"] else str(row["cluster"])
    ranks = f"{row['strategy']} x{row['world_size']}" if row["world_size"] else str(row["strategy"])
    return [row["id"], row["name"], row["state"], step, best, age(row["created"]), ranks, where]
