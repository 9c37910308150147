"""Runs scripts on gloo ranks that it forks. Started by `ranks.py`, and ends with it.

For each line of JSON on its standard input (`Request`) it writes a line with the exit code to its standard output.

Imports once what every rank needs, and never has a thread: importing costs more CPU than what most ranks then do.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import TypedDict

from trainer.core.processes import die_with_parent
from trainer.runtime.imports import quick_imports


class Request(TypedDict):
    """`script` with `arguments`, as the main module of each of `ranks` processes; rank N writes `folder`/rank-N.log."""

    ranks: int
    folder: str
    script: str
    arguments: list[str]
    cwd: str
    environment: dict[str, str]


def main() -> None:
    die_with_parent(signal.SIGKILL, int(sys.argv[1]))
    with quick_imports():
        for name in ("deepspeed", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "trainer.train.run"):
            importlib.import_module(name)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(_run(json.loads(line)), file=replies, flush=True)


def _run(request: Request) -> int:
    """The first code that is not 0; what then still runs is killed."""
    with socket.socket() as found:  # only now: until the first rank takes it, the port may become another's
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    parent = os.getpid()
    running = set()
    for rank in range(request["ranks"]):
        child = os.fork()
        if child == 0:
            die_with_parent(signal.SIGKILL, parent)
            os.environ.clear()
            os.environ.update(request["environment"], MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
            _rank(request, rank)
        running.add(child)
    code = 0
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if code == 0 and (code := abs(os.waitstatus_to_exitcode(status))) != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return code


def _rank(request: Request, rank: int) -> None:
    log = os.open(Path(request["folder"]) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(file, number)
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["arguments"]]
    code = 1
    try:
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
