"""`python fork_ranks.py RANKS FOLDER SCRIPT [ARGUMENT ...]`: SCRIPT on each of RANKS gloo ranks, as its main module.

Imports once what every rank needs, and forks them before there is a thread: importing costs more CPU than what the
ranks then do. Rank N's output goes to FOLDER/rank-N.log. Exits with the first code that is not 0; the rest is killed.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

from trainer.cluster.processes import die_with_parent
from trainer.worker.imports import quick_imports


def main() -> int:
    ranks, folder, script, arguments = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    with quick_imports():
        for name in ("deepspeed", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "trainer.worker.run"):
            importlib.import_module(name)
    with socket.socket() as found:  # only now: until the first rank takes it, the port may become another's
        found.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(found.getsockname()[1])
    parent = os.getpid()
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            die_with_parent(signal.SIGKILL, parent)
            _rank(rank, folder, script, arguments)
        running.add(child)
    code = 0
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if code == 0 and (code := os.waitstatus_to_exitcode(status)) != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return abs(code)


def _rank(rank: int, folder: Path, script: str, arguments: list[str]) -> None:
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [script, *arguments]
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
