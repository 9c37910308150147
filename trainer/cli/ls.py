"""`trainer ls`: list the runs with their current states."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from trainer.cli import ls_cost
from trainer.cli.common import age, number, table
from trainer.cli.options import Parser, add_output_options, make_parser
from trainer.core.errors import DONE, TrainerError
from trainer.core.text import one_line, printable
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs, runs_dir_from
from trainer.runs.state import STATES
from trainer.runs.summary import summary


def _parser() -> Parser:
    description = (
        "List the runs, newest first. The state is that of the processes and of the SLURM queue now, not only what the "
        "run last recorded."
    )
    parser = make_parser("ls", description, "trainer ls --state running --state queued")
    parser.add_argument(
        "--state",
        choices=STATES,
        action="append",
        metavar="STATE",
        help=f"list only runs in this state; may be repeated: {', '.join(STATES)}",
    )
    parser.add_argument("-n", type=int, metavar="N", help="list only the newest N runs")
    parser.add_argument(
        "--cost", action="store_true", help="list the device-hours, the energy and the cost of each run"
    )
    parser.add_argument("--by", choices=ls_cost.GROUPINGS, help="sum them up by user, month (UTC) or sweep")
    add_output_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run `trainer ls` and return the exit code."""
    options = _parser().parse_args(argv)
    runs = all_runs(runs_dir_from(options.runs_dir))[::-1]
    jobs = states_of(runs)
    rows = [row for run in (runs if options.state else runs[: options.n]) if (row := _summary(run, jobs))]
    if options.state:
        rows = [row for row in rows if row["state"] in options.state][: options.n]
    if options.cost or options.by:
        return ls_cost.show(rows, options.by or "run", options.json)
    if options.json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"no runs in {runs_dir_from(options.runs_dir)}; start one with trainer fit")
    else:
        print(table([_row(row) for row in rows], ["ID", "NAME", "STATE", "STEP", "BEST", "AGE", "STRATEGY", "WHERE"]))
    return DONE


def _summary(run: RunDirectory, jobs: Mapping[str, str] | None) -> dict[str, Any] | None:
    """Return the summary of a run; for a damaged run print a warning to stderr and return None."""
    try:
        return summary(run, jobs)
    except Exception as error:  # whatever it is, the other runs are listed
        reason = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        print(f"trainer: skipped {one_line(run.path.name)}: {printable(reason)}", file=sys.stderr)
        return None


def _row(row: dict[str, Any]) -> list[str]:
    step = "" if row["step"] is None else str(row["step"]) + (f"/{row['max_steps']}" if row["max_steps"] else "")
    best = f"{row['best']['metric']} {number(row['best']['value'])}" if row["best"] else ""
    where = f"slurm {row['slurm_job_id']}" if row["slurm_job_id"] else str(row["cluster"])
    ranks = f"{row['strategy']} x{row['world_size']}" if row["world_size"] else str(row["strategy"])
    return [row["id"], row["name"], row["state"], step, best, age(row["created"]), ranks, where]
