"""What the verbs on runs share: their options, their tables, their words for times and sizes."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence

from trainer.runs.directory import RunDirectory
from trainer.runs.registry import reference_to


def parser_of(verb: str, description: str, example: str, run: bool = True) -> argparse.ArgumentParser:
    """A parser with `[RUN]`, `--runs-dir` and `--json`."""
    parser = argparse.ArgumentParser(
        prog=f"trainer {verb}", description=description, epilog=f"example: {example}", allow_abbrev=False
    )
    if run:
        parser.add_argument("run", nargs="?", metavar="RUN", help="id, prefix, name, path or SLURM job; the latest")
    parser.add_argument("--runs-dir", metavar="DIR", help="where the runs are: TRAINER_RUNS_DIR, else ./runs")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def launched(run: RunDirectory) -> str:
    """`launched`, or as which job."""
    job_id = run.launch().get("slurm_job_id")
    return f"submitted as job {job_id}" if job_id else "launched"


def how_to_watch(run: RunDirectory) -> str:
    """The two commands for a run that goes on by itself."""
    name = reference_to(run)
    return f"to watch it: trainer logs -f {name}; to stop it: trainer stop {name}"


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Left-aligned columns; columns from the right are dropped where the terminal is too narrow for them."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    while len(widths) > 2 and sum(widths) + 2 * (len(widths) - 1) > width:
        widths.pop()
    shown = ["  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=False)).rstrip() for line in lines]
    return "\n".join(line[:width] for line in shown)


def age(seconds_since_1970: float | None) -> str:
    """`3m`, `5h`, `2d` ago; empty where not known."""
    if seconds_since_1970 is None:
        return ""
    return duration(max(0.0, time.time() - seconds_since_1970))


def duration(seconds: float) -> str:
    """In its largest unit: `45s`, `3m`, `5h`, `2d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def size(num_bytes: int | None) -> str:
    """`648 kB`, `1.2 GB`; powers of 1000."""
    if num_bytes is None:
        return ""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def number(value: float | str | None) -> str:
    """A metric in four significant digits."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
