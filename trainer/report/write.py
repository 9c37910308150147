"""Write `report.html`: on request, and when a training ends, which it never delays for long nor makes fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

from trainer.core.files import write_atomic
from trainer.report.page import report
from trainer.runs.directory import RunDirectory

FILE = "report.html"
READ_S, LIMIT_S = 8.0, 20.0
"""At the end of a training: how long metrics are read, and how long the end waits for the report."""
_ENDS = ("finished", "stopped", "failed", "hung")


def write(
    run: RunDirectory,
    slurm_states: Mapping[str, str] | None = None,
    *,
    path: Path | None = None,
    deadline: float | None = None,
) -> Path:
    """Write the report of a run and return its path.

    Args:
        run: The run.
        slurm_states: As in `runs.state.state_of`.
        path: The file; None: `report.html` in the run directory.
        deadline: When to stop reading metrics, by `time.monotonic`; None: never.

    Raises:
        OSError: The file cannot be written.
    """
    path = path or run.path / FILE
    write_atomic(path, report(run, slurm_states, deadline=deadline))
    return path


def at_end(run: RunDirectory, *, on_slurm: bool) -> None:
    """Write the report of a run whose last attempt has ended for good, unless `report=false`.

    On SLURM only the job script knows whether it is the end: of other calls nothing comes there.

    In a thread, because a file system may hang: the process that has ended its training waits `LIMIT_S` seconds at
    most. Every failure is one line in the log.
    """
    thread = threading.Thread(target=_write_or_report, args=(run, on_slurm, time.monotonic() + READ_S), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    if thread.is_alive():
        print(f"{FILE} was not written within {LIMIT_S:g} s; trainer report writes it", flush=True)


def _write_or_report(run: RunDirectory, on_slurm: bool, deadline: float) -> None:
    try:
        if (run.launch().cluster == "slurm") is not on_slurm or run.config().get("report", True) is not True:
            return
        ends = run.attempts()
        if ends and ends[-1].outcome in _ENDS and not ends[-1].restarted:
            write(run, deadline=deadline)
    except Exception as error:  # the training has ended as it has, with or without a report
        print(f"{FILE} was not written: {type(error).__name__}: {error}", flush=True)
