"""`trainer compare RUN RUN ...`: show what differs between runs, in what they were given and in what came out."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from typing import Any

from trainer.cli.options import RUN_HELP, add_output_options, make_parser
from trainer.core.errors import DONE, UserError
from trainer.core.secrets import mask, mask_inside
from trainer.core.text import one_line, printable
from trainer.launch.jobs import states_of
from trainer.runs.comparison import Comparison, Section, compare
from trainer.runs.registry import find, runs_dir_from

_DESCRIPTION = (
    "Show what differs between runs: configuration, code, packages, hardware, data and results. What is equal is left "
    "out. The code of two runs is shown as a unified diff. Metrics are compared step by step with the first run."
)
_NOT_RECORDED = "(not recorded)"
_ABSENT = {
    "config": "(not set)",
    "code": "(no file)",
    "packages": "(not installed)",
    "hardware": _NOT_RECORDED,
    "data": "(none)",
    "results": "(none)",
}
"""What is shown for a run without the key of a row, by section."""


def main(argv: list[str]) -> int:
    """Run `trainer compare` and return the exit code."""
    parser = make_parser("compare", _DESCRIPTION, "trainer compare k3v9 p7ab", "trainer compare k3v9 p7ab --files")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"two or more runs, each by {RUN_HELP}")
    add_options(parser)
    return show(parser.parse_args(argv))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare` and `diff`."""
    parser.add_argument("--files", action="store_true", help="name the files of the code that differ, without a diff")
    add_output_options(parser)


def show(options: argparse.Namespace) -> int:
    """Print what differs between `options.runs`, and return the exit code.

    Raises:
        UserError: It is only one run, or one cannot be found or read.
    """
    runs_dir = runs_dir_from(options.runs_dir)
    runs = list({run.path.resolve(): run for run in (find(name, runs_dir) for name in options.runs)}.values())
    if len(runs) < 2:
        raise UserError(f"{runs[0].path.name} is the only run named", "name two or more; trainer ls lists the runs")
    comparison = compare(runs, states_of(runs), diffs=not options.files)
    if options.json:
        print(json.dumps(mask_inside({"runs": [str(run.path) for run in runs], **asdict(comparison)}), indent=1))
    else:
        print(mask("\n".join(_sheet(comparison))))
    return DONE


def _sheet(comparison: Comparison) -> list[str]:
    lines = []
    for name, section in comparison.sections.items():
        if section.rows or section.not_recorded:
            lines += [name, *_rows(section, comparison.labels, _ABSENT[name]), ""]
        if name == "code":
            lines += [printable(line) for diff in comparison.diffs.values() for line in [*diff.split("\n"), ""]]
    lines += [f"metrics of {one_line(label)}: {_curve(one)}" for label, one in comparison.curves.items()]
    equal = [name for name, one in comparison.sections.items() if not one.rows and not one.not_recorded]
    return [*lines, *([f"equal: {', '.join(equal)}"] if equal else [])]


def _curve(difference: dict[str, Any]) -> str:
    """Describe where the metrics begin to differ from those of the first run."""
    steps, names = difference["steps"], difference.get("metrics", [])
    if names:
        some = one_line(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"differ from those of the first run at step {difference['step']}: {some}"
    return f"equal to those of the first run at {steps} steps" if steps else "no step in common with the first run"


def _rows(section: Section, labels: list[str], absent: str) -> list[str]:
    """Return a table with a column per run; a row whose cells are too long for it has a line per run."""
    words = {label: _NOT_RECORDED if label in section.not_recorded else absent for label in labels}
    cells = {
        key: [_cell(values[label]) if label in values else words[label] for label in labels]
        for key, values in section.rows.items()
    }
    width = shutil.get_terminal_size((120, 24)).columns
    key_width = min(max(map(len, cells), default=0), width // 3)
    cell_width = max((width - 2 - key_width) // len(labels) - 2, 8)
    header = [one_line(label) for label in labels]
    as_table = [row for row in cells.values() if all(len(cell) <= cell_width for cell in row)]
    widths = [max(len(row[column]) for row in [header, *as_table]) for column in range(len(labels))]
    lines = []
    if as_table:
        lines.append("  ".join(["  " + " " * key_width, *map(str.ljust, header, widths)]).rstrip())
    for key, row in cells.items():
        if row in as_table:
            lines.append("  ".join(["  " + one_line(key).ljust(key_width), *map(str.ljust, row, widths)]).rstrip())
        else:
            lines += [f"  {one_line(key)}", *(f"    {name}  {cell}" for name, cell in zip(header, row, strict=True))]
    return lines + [f"  not recorded by {one_line(label)}, made by an older version" for label in section.not_recorded]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
