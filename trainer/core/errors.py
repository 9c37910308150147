"""The exit codes, and the errors that end a command with one of them and without a traceback."""

from __future__ import annotations

# Of the command line.
DONE = 0
JOB_FAILED = 1
USER_MUST_CHANGE = 2
ENVIRONMENT_MUST_CHANGE = 3
INTERRUPTED = 130
"""What a shell shows for Ctrl-C; `trainer fit` returns it after the clean stop."""

# Of a job's node process (`launch/node`), beside 0, 1 and 128 + signal.
REQUEUE = 75
"""Saved; run me again. sysexits.h calls it EX_TEMPFAIL."""
NEVER_RESTART = 93
"""Running again would end the same way: no progress, wrong configuration, failed import."""
HUNG = 124
"""Killed because nothing moved; what timeout(1) returns."""


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
    """The user must change something: configuration, arguments."""

    code = USER_MUST_CHANGE


class EnvironmentFault(TrainerError):
    """The environment must change: no SLURM, no GPU, disk full."""

    code = ENVIRONMENT_MUST_CHANGE
