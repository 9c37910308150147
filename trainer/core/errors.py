"""Exit codes, and the exceptions that end a command with one of them and no traceback."""

from __future__ import annotations

from dataclasses import dataclass

# Exit codes of the command line.
DONE = 0
JOB_FAILED = 1
USER_MUST_CHANGE = 2
ENVIRONMENT_MUST_CHANGE = 3
INTERRUPTED = 130
"""Exit code that a shell reports for Ctrl-C. `trainer fit` returns it after a clean stop."""

# Exit codes of a job's node process (`launch/node`), in addition to 0, 1 and 128 + signal.
REQUEUE = 75
"""Checkpoint saved; requeue the job. sysexits.h calls it EX_TEMPFAIL."""
NEVER_RESTART = 93
"""A restart would fail the same way: no progress, invalid configuration, failed import."""
HUNG = 124
"""Killed because it made no progress. timeout(1) returns the same code."""


class TrainerError(Exception):
    """An expected failure: the command prints `message`, then `fix`, and exits with `code`."""

    code = JOB_FAILED

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  {self.fix}" if self.fix else self.message


class UserError(TrainerError):
    """A failure that the user fixes by changing the configuration or the arguments."""

    code = USER_MUST_CHANGE


class EnvironmentFault(TrainerError):
    """A failure that is fixed by changing the environment: no SLURM, no GPU, disk full."""

    code = ENVIRONMENT_MUST_CHANGE


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A `TrainerError` as one process reports it to another."""

    message: str
    fix: str
