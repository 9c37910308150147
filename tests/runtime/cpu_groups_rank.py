"""One of four ranks that reduce over a tree of pairs, and of which one then stops; for `test_cpu_groups.py`.

`python cpu_groups_rank.py FOLDER`
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from trainer.runtime import cpu_groups
from trainer.runtime.flight_recorder import set_timeout, write_trace

STOPPED = 3


def reduce(group: dist.ProcessGroup, error_file: Path) -> None:
    try:
        cpu_groups.all_reduce(torch.zeros(1), ReduceOp.MAX, group)
    except RuntimeError as error:
        error_file.write_text(str(error))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    cpu_groups.FULL_MESH_UP_TO, cpu_groups.FAN_OUT = 1, 2
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = cpu_groups.new_group(timedelta(seconds=60), with_tree=True)
    results = {}
    for name, op in {"sum": ReduceOp.SUM, "max": ReduceOp.MAX, "min": ReduceOp.MIN}.items():
        values = torch.tensor([float(rank + 1), -float(rank)])
        cpu_groups.all_reduce(values, op, group)
        results[name] = values.tolist()
    started = torch.tensor([rank])
    wait = cpu_groups.start_all_reduce(started, ReduceOp.MAX, group)
    results["gathered"] = cpu_groups.gather(f"of rank {rank}", group)
    wait()
    results["started"] = started.tolist()
    own = dist.new_group(
        list(range(dist.get_world_size())), use_local_synchronization=True
    )  # as FSDP2 and NCCL make some
    values = torch.tensor([rank])
    dist.all_reduce(values, group=own)
    results["in a later group"] = values.tolist()
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    results["gathered"] = cpu_groups.gather({"again": rank}, group)

    dist.barrier()
    set_timeout(2)
    began = time.monotonic()
    trace, newer = folder / f"rank-{rank}.collectives.json", folder / f"newer-{rank}.json"
    write_trace(trace)
    if rank != STOPPED:
        waiting = threading.Thread(target=reduce, args=(group, folder / f"error-{rank}.json"))
        waiting.start()
        while waiting.is_alive():
            write_trace(newer)
            if waiting.is_alive():  # a collective that has timed out does not wait any more
                newer.replace(trace)
            time.sleep(0.05)
    (folder / f"done-{rank}").touch()
    while len(list(folder.glob("done-*"))) < dist.get_world_size() and time.monotonic() < began + 30:
        time.sleep(0.02)  # the others still wait for this rank, which must not seem to have died
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
