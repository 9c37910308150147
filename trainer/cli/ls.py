"""`trainer ls`: list the runs with their current states."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from trainer.cli import ls_cost, ls_output
from trainer.cli.common import table
from trainer.cli.options import Parser, add_output_options, make_parser
from trainer.core.errors import DONE
from trainer.core.secrets import mask
from trainer.core.text import one_line, printable
from trainer.launch.jobs import states_of_jobs
from trainer.runs.columns import ordered, require_keys, value_of
from trainer.runs.directory import RunDirectory
from trainer.runs.index import Index
from trainer.runs.registry import runs_dir_from
from trainer.runs.row import Row
from trainer.runs.state import STATES
from trainer.runs.summary import checkpoints
from trainer.runs.where import parse, select

EVERY_S = 2.0
"""Time between two looks of `--watch`."""
_DESCRIPTION = (
    "List the runs, newest first. The state is that of the processes and of the SLURM queue now, not only what the run "
    "last recorded. A KEY is a column, a metric (val/acc: its last value; val/acc.best, .min, .max) or a key of the "
    "configuration (optimizer.lr)."
)


def _parser() -> Parser:
    parser = make_parser(
        "ls",
        _DESCRIPTION,
        "trainer ls --state running --state queued",
        "trainer ls --where 'state=finished model=resnet18 val/acc>0.9'",
        "trainer ls --sort val/acc --columns +optimizer.lr,val/acc",
    )
    parser.add_argument(
        "--state",
        choices=STATES,
        action="append",
        metavar="STATE",
        help=f"list only runs in this state; may be repeated: {', '.join(STATES)}",
    )
    add_where(parser)
    parser.add_argument(
        "--sort", metavar="KEY", help="sort by KEY: metrics best first, everything else in ascending order"
    )
    parser.add_argument("--sweep", metavar="SWEEP", help="only the runs of a sweep: its id, its name or a prefix")
    parser.add_argument("--reverse", action="store_true", help="reverse the order")
    parser.add_argument("--columns", metavar="KEY,...", help="columns to show; +KEY,... in addition to the usual ones")
    parser.add_argument("-n", "--limit", type=positive, metavar="N", help="list only the first N runs")
    parser.add_argument(
        "--cost", action="store_true", help="list the device-hours, the energy and the cost of each run"
    )
    parser.add_argument("--by", choices=ls_cost.GROUPINGS, help="--cost, summed by user, month (UTC) or sweep")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", action="store_true", help="print CSV, with the metrics and the keys that differ")
    output.add_argument("--parquet", metavar="FILE", type=Path, help="write the same to a Parquet file")
    output.add_argument("--watch", action="store_true", help=f"redraw every {EVERY_S:.0f} s until Ctrl-C")
    add_output_options(parser, output)
    return parser


def add_where(parser: argparse.ArgumentParser) -> None:
    """Add `--where`."""
    parser.add_argument(
        "--where",
        metavar="CONDITIONS",
        action="append",
        default=[],
        help="only runs that meet all conditions, separated by spaces: KEY=VALUE, or with != < <= > >=; a comma is "
        "an or (state=failed,dead), * matches any text (name=res*)",
    )


def positive(text: str) -> int:
    """Parse a number of runs."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of runs")
    return int(text)


def report_problems(index: Index) -> None:
    """Print the runs that cannot be read to stderr."""
    for path, reason in sorted(index.problems().items()):
        print(f"trainer: skipped {one_line(path.name)}: {printable(reason)}", file=sys.stderr)


def main(argv: list[str]) -> int:
    """Run `trainer ls` and return the exit code."""
    options = _parser().parse_args(argv)
    index = Index(runs_dir_from(options.runs_dir), states_of_jobs)
    if options.watch:
        return _watch(index, options)
    was_enabled = gc.isenabled()
    gc.disable()  # it would walk all rows again and again, which are no garbage: half of the CPU time
    try:
        return _list(index, options)
    finally:
        if was_enabled:
            gc.enable()


def _list(index: Index, options: argparse.Namespace) -> int:
    rows = _chosen(index, options)
    if options.cost or options.by:
        return ls_cost.show([row.facts for row in rows], options.by or "run", options.json)
    if options.json:
        print(mask(json.dumps([_json(row, options) for row in rows], indent=1)))
    elif options.csv:
        ls_output.write_csv(rows, _columns(options) or ls_output.all_columns(rows), sys.stdout)
    elif options.parquet:
        ls_output.write_parquet(rows, _columns(options) or ls_output.all_columns(rows), options.parquet)
        print(f"wrote {len(rows)} runs to {options.parquet}")
    else:
        print("\n".join(_table(rows, index, options)))
    return DONE


def _chosen(index: Index, options: argparse.Namespace) -> list[Row]:
    """Return the runs to list, in order. Those that cannot be read are reported on stderr."""
    conditions = [condition for text in options.where for condition in parse(text)]
    index.refresh()
    report_problems(index)
    everything = index.rows()[::-1]
    rows = [row for row in everything if not options.state or row.state in options.state]
    rows = [row for row in rows if options.sweep is None or _is_of_sweep(row, options.sweep)]
    require_keys([one.key for one in conditions], everything, "--where")
    rows = select(rows, conditions) if rows else rows
    if options.sort:
        require_keys([options.sort], everything, "--sort")
        rows = ordered(rows, options.sort)
    require_keys(_columns(options), everything, "--columns")
    return (rows[::-1] if options.reverse else rows)[: options.limit]


def _is_of_sweep(row: Row, reference: str) -> bool:
    name = str(row.facts.get("sweep") or "")
    return bool(name) and (name.startswith(reference) or name.rpartition("-")[2].startswith(reference))


def _columns(options: argparse.Namespace) -> list[str]:
    """Return the columns that were asked for; empty without `--columns`."""
    return ls_output.split_columns(options.columns) if options.columns else []


def _json(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    if options.columns:
        return {key: value_of(row, key) for key in _columns(options)}
    if row.config.get("checkpoint.local_dir"):  # those of this node are not sealed
        config = {"checkpoint": {"local_dir": row.config["checkpoint.local_dir"]}}
        return {**row.facts, "checkpoints": checkpoints(RunDirectory(row.path), config)}
    return row.facts


def _table(rows: list[Row], index: Index, options: argparse.Namespace) -> list[str]:
    if not rows and not index.rows():
        return [f"no runs in {runs_dir_from(options.runs_dir)}; start one with trainer fit"]
    if not rows:
        return [f"none of {len(index.rows())} runs meets the conditions"]
    keys = _columns(options) or ls_output.DEFAULT
    cells = [[ls_output.cell(row, key) for key in keys] for row in rows]
    return mask(table(cells, [ls_output.header(key) for key in keys])).split("\n")


def _watch(index: Index, options: argparse.Namespace) -> int:
    """Redraw the table in place; without a terminal print it when a state has changed, until no run is active."""
    drawn, states, is_terminal = 0, None, sys.stdout.isatty()
    try:
        while True:
            rows = _chosen(index, options)
            lines, before, states = _table(rows, index, options), states, [(row.folder, row.state) for row in rows]
            if is_terminal:
                height = max(shutil.get_terminal_size().lines - 2, 3)
                if len(lines) > height:
                    lines = [*lines[: height - 1], f"... {len(lines) - height + 1} more; see --limit, --where"]
                print((f"\x1b[{drawn}F\x1b[J" if drawn else "") + "\n".join(lines), flush=True)
                drawn = len(lines)
            elif states != before:
                print("\n".join(lines), flush=True)
            if not is_terminal and not any(row.is_active for row in index.rows()):
                return DONE
            time.sleep(EVERY_S)
    except KeyboardInterrupt:
        return DONE
