"""Stop and resume runs as the command line does, in processes of their own."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Literal, get_args

from trainer.core import processes
from trainer.core.text import printable
from trainer.runs.directory import RunDirectory

Action = Literal["stop", "resume"]
ACTIONS: tuple[Action, ...] = get_args(Action)
_OPTIONS: dict[Action, tuple[str, ...]] = {"stop": ("--wait", "0"), "resume": ("--detach",)}
_TIMEOUT_S = 120.0


async def act(action: Action, run: RunDirectory) -> dict[str, Any]:
    """Run `trainer stop` or `trainer resume` on a run, and return its exit code and what it printed.

    `stop` returns as soon as the run has been asked. A run that somebody else may have written is not resumed: that
    needs `--trust` on the command line.
    """
    command = processes.python_module("trainer", action, str(run.path), *_OPTIONS[action])
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "100"},
        start_new_session=True,  # a job that it launches must survive the Ctrl-C that ends the dashboard
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
    except asyncio.TimeoutError:  # another class before Python 3.11
        process.kill()
        await process.wait()
        return {"code": 1, "output": f"trainer {action} took more than {_TIMEOUT_S:g} s"}
    text = printable(output.decode(errors="replace")).strip()
    # Still active right after it was asked is what a stop is expected to report.
    asked = action == "stop" and process.returncode == 1 and ": stopping" in text
    return {"code": 0 if asked else process.returncode, "output": text}
