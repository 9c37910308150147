"""Two ranks that save a sharded checkpoint, one of them killed at a fault point; for `test_sharded.py`.

`python sharded_ranks.py FOLDER '[["commit.begin", 0], ...]'`: this process imports torch once and forks the ranks of
each case, before it has any thread. Prints one JSON object a case.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer.checkpoint import faults
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint

BOUND_S = 90.0


def rank_main(folder: Path, rank: int, fault: str | None) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    group = dist.new_group(backend="gloo")
    writer = CheckpointWriter(CheckpointStore(folder / "checkpoints"), asynchronous=True)
    for step in (10, 20):
        if step == 20 and fault is not None:
            faults._reached.clear()
            os.environ[faults.VARIABLE] = fault
        whole = torch.arange(35.0).view(7, 5) + step
        tensors = {"model/a": distribute_tensor(whole, mesh, [Shard(0)])}
        if rank == 0:
            tensors["model/b"] = torch.full((3,), float(step))
        writer.save_sharded(
            tensors, {"step": step, "optimizers": {}}, writer.store.path(step), CommitInfo(step=step), group
        )
        writer.wait()
        writer.raise_if_failed()
    os._exit(0)


def case(folder: Path, fault: str | None, victim: int) -> dict[str, object]:
    folder.mkdir(parents=True)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                rank_main(folder, rank, fault if rank == victim else None)
            except BaseException as error:
                print(f"rank {rank}: {error}", file=sys.stderr)
                os._exit(1)
        children.append(child)
    codes = [wait(child) for child in children]
    store = CheckpointStore(folder / "checkpoints")
    found, skipped = store.newest_good()
    assert found is not None
    tensors = StoredCheckpoint(found.path).whole()
    good = torch.equal(tensors["model/a"], torch.arange(35.0).view(7, 5) + found.step)
    return {"codes": codes, "step": found.step, "skipped": skipped, "good": good, "b": tensors["model/b"].tolist()}


def wait(child: int) -> int:
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


if __name__ == "__main__":
    for number, (point, victim) in enumerate(json.loads(sys.argv[2])):
        found = case(Path(sys.argv[1]) / str(number), point, victim)
        print(json.dumps({"point": point, "victim": victim, **found}), flush=True)
