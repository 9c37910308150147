"""Advance a sweep from the command line, and follow it until it is over."""

from __future__ import annotations

import socket
import time
from typing import TextIO

from trainer.cli.sweep_table import headline, is_over
from trainer.core.errors import DONE, INTERRUPTED, JOB_FAILED
from trainer.core.text import one_line
from trainer.sweeps import slots
from trainer.sweeps.advance import completed
from trainer.sweeps.analysis import table_of
from trainer.sweeps.decide import why_stopped
from trainer.sweeps.directory import SweepDirectory, reference_to
from trainer.sweeps.progress import TrialView, settle, views
from trainer.sweeps.records import Spec

_POLL_S = 2.0


def advance(sweep: SweepDirectory, *, submit: bool = False) -> tuple[Spec, list[TrialView]]:
    """Record what has ended, start what may start, and return the trials.

    Args:
        sweep: The sweep.
        submit: On SLURM, also submit jobs for trials that never had one.
    """
    spec = sweep.spec()
    if spec.cluster == "slurm":
        from trainer.sweeps import arrays

        return spec, arrays.advance(sweep, spec, submit="all" if submit else "lost")
    found = completed(sweep, spec, settle(sweep, spec, views(sweep, None)))
    if spec.host == socket.gethostname():
        slots.start_slots(sweep, spec, found)
    return spec, found


def follow(sweep: SweepDirectory, stream: TextIO) -> int:
    """Print each trial when it ends, until the sweep is over; return 0 if none failed. Ctrl-C detaches."""
    printed: set[int] = set()
    try:
        while True:
            spec, found = advance(sweep)
            for view in found:
                result = view.result
                if result is not None and view.number not in printed:
                    printed.add(view.number)
                    value = f"  {result.values[0]:.4g}" if result.values else ""
                    point = " ".join(f"{key}={text}" for key, text in view.trial(sweep).values.items())
                    reason = f": {one_line(result.reason)}" if result.reason else ""
                    print(
                        f"trial {view.number} {result.state}{value}  {one_line(point)}{reason}", file=stream, flush=True
                    )
            is_idle = not any(view.is_alive for view in found)
            if is_over(spec, found) or (is_idle and why_stopped(spec, found, is_stopped=sweep.stop_request.exists())):
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe sweep continues; trainer sweep status {reference_to(sweep)} shows it", file=stream)
        return INTERRUPTED
    print("\n".join(headline(sweep, spec, found)), file=stream)
    for row in table_of(sweep, spec, found).ranked()[:1]:
        point = " ".join(f"{key}={value}" for key, value in row.parameters.items())
        print(f"best: trial {row.number}, {row.values[0]:.4g}  {one_line(point)}  {row.run_name}", file=stream)
    return DONE if all(view.result is not None and view.result.state != "failed" for view in found) else JOB_FAILED
