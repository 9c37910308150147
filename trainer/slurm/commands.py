"""Calling SLURM's commands: bounded in time, with an error that says what to do."""

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
"""While the controller is away a command blocks for about 9 s before it gives up."""
_PATIENCE_S = 900.0
_UNREACHABLE = re.compile(
    r"Unable to contact slurm controller|Connection refused|Socket timed out|Connection timed out"
    r"|Could not establish a configuration source|Protocol authentication error|controller not responding",
    re.IGNORECASE,
)


Answer = TypeVar("Answer")


class SlurmRefused(Exception):
    """A command was understood and refused; the text is SLURM's own."""


def is_here() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("sbatch") is not None


def run(
    *command: str,
    environment: Mapping[str, str] | None = None,
    standard_input: str = "",
    timeout_s: float = TIMEOUT_S,
) -> str:
    """What the command prints. Raises SlurmRefused with its complaint, EnvironmentFault where SLURM is not here or
    does not answer."""
    # The names of the fields and of the states are the same in every language; the times would not be.
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
            f"there is no {command[0]} on this machine", "log in to a machine of the cluster, or use cluster=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise _unreachable(f"{command[0]} gave no answer in {timeout_s:.0f} s") from None
    if done.returncode == 0:
        return done.stdout
    complaint = _complaint(command[0], done.stderr or done.stdout)
    if _UNREACHABLE.search(done.stderr):
        raise _unreachable(complaint)
    raise SlurmRefused(complaint)


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns, once the controller answers: a job that runs loses nothing by waiting for it."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask()
        except EnvironmentFault as error:
            if time.monotonic() > deadline:
                raise
            print(f"waiting for SLURM's controller: {error.message}", file=sys.stderr, flush=True)
            time.sleep(5)


def _unreachable(what: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"SLURM does not answer: {what}", "try again in a minute; `scontrol ping` says whether the controller is up"
    )


def _complaint(program: str, text: str) -> str:
    """SLURM's last words without the prefixes `sbatch: error:`."""
    lines = [re.sub(rf"^{program}: (error: |fatal: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or f"{program} failed and did not say why"
