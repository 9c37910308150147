"""A rank that writes down what it finds around it. In the first attempt rank 1 then fails, once FOLDER/stay does not
exist any more, and rank 0 waits to be ended."""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

from trainer.core.files import write_atomic

_open: list[TextIO] = []
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


def main() -> int:
    from trainer.runtime import process

    process.die_with_parent()
    folder, rank = Path(sys.argv[1]), process.Rank.from_environment()
    preloaded = "lightning_utilities.core.rank_zero" in sys.modules or "torchmetrics" in sys.modules
    report = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "rank": rank.rank,
        "attempt": rank.attempt,
        "name": __name__,
        "spec": __spec__.name if __spec__ else None,
        "argv": sys.argv,
        "environment": {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "preload_variable": os.environ.get("TRAINER_PRELOAD"),
        "import_s": os.environ.get("TRAINER_IMPORT_S", "0"),
        "comm": Path("/proc/self/comm").read_text().strip(),
        "preloaded": preloaded,
        "signals": {number.name: signal.getsignal(number).name for number in _SIGNALS},
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd") if _is_open(int(name))),
        "rank_zero_only": None,
        "random": str([random.random()]),
    }
    if preloaded:
        import numpy
        import torch
        from lightning_utilities.core.rank_zero import rank_zero_only

        report["rank_zero_only"] = rank_zero_only.rank
        report["random"] = str([random.random(), numpy.random.random(), torch.rand(1).item()])
    _open.append((folder / f"unflushed-{rank.attempt}-{rank.rank}").open("w"))
    _open[0].write("whole")
    atexit.register(lambda: os.write(2, f"rank {rank.rank}: at the end of {os.getpid()}\n".encode()))
    if rank.rank == 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    write_atomic(folder / f"report-{rank.attempt}-{rank.rank}.json", json.dumps(report))
    if rank.attempt > 0:
        return 0
    while rank.rank == 0 or (folder / "stay").exists() or not (folder / "report-0-0.json").exists():
        time.sleep(0.02)  # the first until torchrun ends it
    return 7


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
