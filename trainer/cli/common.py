"""Output that the verbs on runs share: tables, times, sizes, hints."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence

from trainer.core.text import one_line
from trainer.core.units import three_digits
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import reference_to


def launched(run: RunDirectory) -> str:
    """Return `launched`, or `submitted as job ID` on SLURM."""
    job_id = run.launch().slurm_job_id
    return f"submitted as job {job_id}" if job_id else "launched"


def how_to_watch(run: RunDirectory) -> str:
    """Return the commands that follow and stop a run that was launched in the background."""
    name = reference_to(run)
    return f"to watch it: trainer logs -f {name}; to stop it: trainer stop {name}"


def agrees(question: str) -> bool:
    """Ask on the terminal; the end of the input (Ctrl-D) is a no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Format left-aligned columns. Columns that do not fit the terminal are dropped, from the right."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [header, *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    while len(widths) > 2 and sum(widths) + 2 * (len(widths) - 1) > width:
        widths.pop()
    shown = ["  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=False)).rstrip() for line in lines]
    return "\n".join(line[:width] for line in shown)


def age(seconds_since_1970: float | None) -> str:
    """Return the time since then as `3m`, `5h` or `2d`, or an empty string if it is not known."""
    if seconds_since_1970 is None:
        return ""
    return duration(max(0.0, time.time() - seconds_since_1970))


def duration(seconds: float) -> str:
    """Format a duration in its largest unit: `45s`, `3m`, `5h`, `2d`; `?` if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def size(num_bytes: int | None) -> str:
    """Format a size as `648 kB` or `1.2 GB` (powers of 1000)."""
    if num_bytes is None:
        return ""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{three_digits(value)} {units[0]}"


def number(value: float | str | None) -> str:
    """Format a metric with four significant digits."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
