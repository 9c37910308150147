"""`python -m trainer.notify RUN_DIR`: one pass, in a process that the observer of a run may kill at any time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from trainer.config.notify import channel_names
from trainer.core.errors import TrainerError
from trainer.notify.deliver import deliver, options_of, report
from trainer.runs.directory import RunDirectory
from trainer.runs.state import State


def main(arguments: list[str]) -> int:
    """Send what is due of the run whose directory is named; print a line on each message."""
    # SLURM signals each process of a job that is about to end, and this one has something to say about that.
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    run = RunDirectory(Path(arguments[0]))
    for message, failures in deliver(run, State("running")):
        print(report(message, failures, channel_names(options_of(run) or {})), flush=True)
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except TrainerError as error:
        print(f"notify: {error}", flush=True)
        code = error.code
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait for a name server
