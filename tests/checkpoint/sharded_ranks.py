"""Ranks that save sharded checkpoints, for `test_sharded.py`.

Two, one of which is killed at a fault point; four that save in several layouts.

`python sharded_ranks.py FOLDER '[["commit.begin", 0], ...]'`: this process imports torch once and forks the ranks of
each case, before it has any thread. Prints one JSON object a case, and last one with the bytes of each layout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from trainer.checkpoint import faults, hashing
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.hashing import sha256
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.train.newest_checkpoint import Ranks

BOUND_S = 200.0
WHOLE = {name: torch.arange(2.0**18).view(512, 512) + number for number, name in enumerate("abcd")}


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


def layout_main(folder: Path, rank: int) -> None:
    """Save the same tensors as fsdp, hsdp and ddp do, damage a shard of the newest of fsdp, and look for a good one."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    group = dist.new_group(backend="gloo")
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts = {"fsdp": (flat, [Shard(0)]), "hsdp": (square, [Replicate(), Shard(0)])}
    seen: dict[str, object] = {}
    for name, (mesh, placements) in layouts.items():
        writer = CheckpointWriter(CheckpointStore(folder / name), asynchronous=True)
        tensors = {f"model/{key}": distribute_tensor(whole, mesh, placements) for key, whole in WHOLE.items()}
        for step in (1, 2):
            writer.save_sharded(tensors, {"optimizers": {}}, writer.store.path(step), CommitInfo(step=step), group)
        writer.wait()
        writer.raise_if_failed()
        seen[name] = writer.timing.host_bytes
    shard = folder / "fsdp" / "step-00000002" / "shards" / "__3_0.distcp"
    if rank == 3:
        content = bytearray(shard.read_bytes())
        content[content.index(b"PK", 5000) - 1] ^= 1
        shard.write_bytes(content)
    dist.barrier(group)
    read: list[str] = []
    hashing.sha256 = lambda path: read.append(path.name) or sha256(path)  # type: ignore[assignment, func-returns-value]
    found = (ranks := Ranks(group)).lead(lambda: CheckpointStore(folder / "fsdp").newest_good(verify=ranks.verify))
    seen["newest good"] = [found[0] and found[0].step, found[1]]
    seen["verified"] = read
    if rank == 0:  # as Lightning: the other ranks do not call the plugin
        writer = CheckpointWriter(CheckpointStore(folder / "ddp"), asynchronous=True)
        writer.save({"state_dict": WHOLE}, writer.store.path(1), CommitInfo(step=1))
        writer.wait()
        writer.raise_if_failed()
    (folder / f"found-{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def layouts(folder: Path) -> dict[str, object]:
    """Return the bytes on disk by layout, and those that each rank copied."""
    codes = fork(folder, 4, lambda rank: layout_main(folder, rank))
    stores = {name: CheckpointStore(folder / name) for name in ("fsdp", "hsdp", "ddp")}
    good = {}
    for name in ("fsdp", "hsdp"):
        whole = StoredCheckpoint(stores[name].path(1)).whole("model/")
        good[name] = all(torch.equal(whole[f"model/{key}"], value) for key, value in WHOLE.items())
    return {
        "codes": codes,
        "state": sum(value.nbytes for value in WHOLE.values()),
        "disk": {name: sum(one.stat().st_size for one in store.path(1).rglob("*")) for name, store in stores.items()},
        "ranks": [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(4)],
        "good": good,
    }


def fork(folder: Path, ranks: int, main: Callable[[int], None]) -> list[int]:
    """Return the exit codes of the ranks."""
    folder.mkdir(parents=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                main(rank)
            except BaseException as error:
                print(f"rank {rank}: {error}", file=sys.stderr)
                (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
                os._exit(1)
        children.append(child)
    return [wait(child) for child in children]


def case(folder: Path, fault: str | None, victim: int) -> dict[str, object]:
    codes = fork(folder, 2, lambda rank: rank_main(folder, rank, fault if rank == victim else None))
    store = CheckpointStore(folder / "checkpoints")
    found, skipped = store.newest_good()
    assert found is not None
    tensors = StoredCheckpoint(found.path).whole()
    good = torch.equal(tensors["model/a"], torch.arange(35.0).view(7, 5) + found.step)
    return {
        "codes": codes,
        "step": found.step,
        "skipped": skipped,
        "good": good,
        "b": tensors["model/b"].tolist(),
        "errors": [path.read_text() if (path := folder / f"error-{rank}").exists() else None for rank in (0, 1)],
        "folders": sorted(one.name for one in store.directory.iterdir()),
    }


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
    print(json.dumps(layouts(Path(sys.argv[1]) / "layouts")))
