"""`trainer report [RUN ...]`: write one self-contained page about a run, or one that compares several."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from trainer.cli.options import RUN_HELP, add_output_options, make_parser
from trainer.core.errors import DONE, EnvironmentFault, UserError
from trainer.core.files import write_atomic
from trainer.launch.jobs import states_of
from trainer.report.comparison import MOST_RUNS
from trainer.report.page import report, report_of_several
from trainer.report.pdf import find_browser, print_pdf
from trainer.report.write import FILE
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import find, runs_dir_from, shortest

_DESCRIPTION = (
    "Write a report of a run as one HTML file without scripts: what was asked, results, curves, where the time, the "
    "energy and the money went, faults, and how to reproduce it. Several runs are compared in one report. That of a "
    "sweep has the trials, parallel coordinates and the importance of the parameters."
)


def main(argv: list[str]) -> int:
    """Run `trainer report` and return the exit code."""
    parser = make_parser(
        "report",
        _DESCRIPTION,
        "trainer report",
        "trainer report k3v9 p7ab --pdf -o runs.html",
        "trainer report --sweep m2x7",
    )
    parser.add_argument("--sweep", metavar="SWEEP", help="report a sweep instead: its id, its name or a prefix")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUN_HELP} (default: the latest run)")
    parser.add_argument("--pdf", action="store_true", help="also print it as PDF, with the Chromium of this machine")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"the file (default: {FILE} in the directory of the run or sweep; of several runs report-ID-ID.html here)",
    )
    add_output_options(parser)
    options = parser.parse_intermixed_args(argv)
    runs_dir = runs_dir_from(options.runs_dir)
    if options.sweep is not None:
        if options.runs:
            raise UserError("--sweep reports a sweep, not runs", "name runs, or a sweep")
        return _report_sweep(options, runs_dir)
    runs = list({run.path.resolve(): run for run in (find(name, runs_dir) for name in options.runs or [None])}.values())
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs: a report compares at most {MOST_RUNS}", "name fewer; trainer ls lists runs")
    states = states_of(runs)
    return _write(
        options, _default(runs), lambda: report(runs[0], states) if len(runs) == 1 else report_of_several(runs, states)
    )


def _report_sweep(options: argparse.Namespace, runs_dir: Path) -> int:
    """Write the report of a sweep into its folder, or where `-o` names."""
    from trainer.cli.sweep_report import as_reported  # for sweeps only
    from trainer.report.sweep import report_of_sweep
    from trainer.sweeps.directory import find as find_sweep
    from trainer.sweeps.directory import sweeps_dir_of

    sweep = find_sweep(options.sweep, sweeps_dir_of(runs_dir))
    return _write(options, sweep.path / FILE, lambda: report_of_sweep(as_reported(sweep)))


def _write(options: argparse.Namespace, default: Path, make: Callable[[], str]) -> int:
    """Write a report, as PDF as well if that was asked for, and print where it is."""
    browser = find_browser() if options.pdf else None
    path = Path(options.output) if options.output else default
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        raise UserError(f"-o {options.output}: not the name of an HTML file", "write -o report.html")
    written = [path]
    try:
        page = make()
        write_atomic(path, page)
        if browser:
            written.append(path.with_suffix(".pdf"))
            print_pdf(page, written[-1], browser)
    except OSError as error:
        raise EnvironmentFault(f"{written[-1]} cannot be written: {error.strerror}", "name another file: -o") from None
    if options.json:
        print(json.dumps({"files": [str(one.resolve()) for one in written]}, indent=1))
    else:
        print("\n".join(shortest(one) for one in written))
    return DONE


def _default(runs: list[RunDirectory]) -> Path:
    """Return where the report is written without `-o`."""
    if len(runs) == 1:
        return runs[0].path / FILE
    ids = "-".join(run.id or run.path.name for run in runs[:4])
    return Path(f"report-{ids}{'-etc' if len(runs) > 4 else ''}.html")
