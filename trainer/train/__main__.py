"""Entry point of one rank of one attempt: `python -m trainer.train RUN_DIR`, started by torchrun.

The order matters. The signal handlers are installed before the rank does anything else: without the fork server it
imports torch next, and SLURM may send a signal during the import. With the fork server torch is imported before the
fork. Anything that fails later, including an import, must be reported in this rank's log.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.core.errors import DONE, EnvironmentFault
from trainer.core.install import refuse_malicious
from trainer.runs.directory import RunDirectory
from trainer.runtime import failure, process, stop
from trainer.runtime.attempt import Attempt
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.imports import quick_imports

EXIT_S = 20.0
"""Longest exit of the interpreter after a failure, where threads and objects of torch and NCCL end."""


def main() -> int:
    """Set up the process, then train; returns the exit code."""
    stop.install_handlers()
    process.frozen_code_first()
    run_path = Path(sys.argv[1])
    process.die_with_parent()
    process.redirect_output(run_path)
    process.dump_stacks_on_request(run_path)
    try:
        refuse_malicious()
        with quick_imports():
            from trainer.train.run import run
    except (ImportError, EnvironmentFault) as error:
        # No restart makes torch or Lightning importable.
        rank, directory = process.Rank.from_environment(), RunDirectory(run_path)
        heartbeat = Heartbeat(directory, rank)
        return failure.conclude(error, Attempt(directory, rank, heartbeat))

    return run(run_path)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code != DONE:
        stop.force_exit_after(EXIT_S, code)
    sys.exit(code)
