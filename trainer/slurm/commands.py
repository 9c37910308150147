"""Run SLURM's commands with a timeout, and with errors that suggest a fix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from trainer.core.errors import EnvironmentFault

TIMEOUT_S = 30.0
"""Timeout of a command. It blocks for about 9 s before it gives up on an unreachable controller."""
_PATIENCE_S = 900.0
"""Time for which `patiently` retries."""
_UNREACHABLE = re.compile(
    r"Unable to contact slurm controller|Connection refused|Socket timed out|Connection timed out"
    r"|Could not establish a configuration source|Protocol authentication error|controller not responding",
    re.IGNORECASE,
)


Answer = TypeVar("Answer")


class SlurmRefused(Exception):
    """SLURM refused a command; the text is SLURM's own."""


def is_here() -> bool:
    """Return whether this machine has SLURM's commands."""
    return shutil.which("sbatch") is not None


def run(
    *command: str,
    environment: Mapping[str, str] | None = None,
    standard_input: str = "",
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Run a SLURM command and return its stdout.

    Raises:
        SlurmRefused: The command failed; the text is its error message.
        EnvironmentFault: SLURM is not installed here or does not respond.
    """
    # Names of fields and states do not depend on the locale, but times do.
    variables = {**(os.environ if environment is None else environment), "LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            command,
            env=variables,
            input=standard_input,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{command[0]} was not found on this machine", "log in to a node of the cluster, or use cluster=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise _unreachable(f"no response from {command[0]} within {timeout_s:.0f} s") from None
    if done.returncode == 0:
        return done.stdout
    message = _error_message(command[0], done.stderr or done.stdout)
    if _UNREACHABLE.search(done.stderr):
        raise _unreachable(message)
    raise SlurmRefused(message)


def number(text: str) -> int | None:
    """Return the number in a field of SLURM's output; None if it holds anything else."""
    return int(text) if text.isdecimal() and len(text) < 19 else None


def patiently(query: Callable[[], Answer]) -> Answer:
    """Return the result of `query`, retried for `_PATIENCE_S` while the controller is unreachable.

    For use within a job, which loses nothing by waiting.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return query()
        except EnvironmentFault as error:
            if time.monotonic() > deadline:
                raise
            print(f"waiting for the SLURM controller: {error.message}", file=sys.stderr, flush=True)
            time.sleep(5)


def _unreachable(reason: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"SLURM does not respond: {reason}", "try again in a minute; `scontrol ping` shows whether the controller is up"
    )


def _error_message(program: str, text: str) -> str:
    """Return SLURM's error message without the prefix `sbatch: error:`."""
    lines = [re.sub(rf"^{program}: (error: |fatal: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or f"{program} failed without an error message"
