"""Ranks of two pretended nodes that save on the disks of their nodes, for `test_node_disk.py`.

`python node_ranks.py FOLDER CASES`: this process imports torch once and forks the ranks of each case, two a node. Those
of a save keep steps 10 and 20; a fault may kill one of them in step 20. Those of a restart choose a checkpoint and load
it. A case is a list of what happens: ["save", fault, victim], ["restart", fault, victim, ranks per node],
["lose node", N], ["damage", file]. Prints one JSON object a case: what each step of it gave.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.checkpoint.sharded_ranks import fork
from trainer.checkpoint import faults, node_record
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.node_disk import NodeDisk, folder_of
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.runtime.process import Rank
from trainer.train import newest_checkpoint
from trainer.train.checkpoint_contents import Stores
from trainer.train.node_checkpoints import NodeCheckpoints, after_save

RANKS = 4
RUN = "r1"
WHOLE = torch.arange(55.0).view(11, 5)


class Job:
    """What a rank of an attempt has before it trains."""

    def __init__(self, folder: Path, number: int, attempt: int, per_node: int, strategy: str) -> None:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / f"rendezvous-{attempt}"), RANKS)
        timeout = timedelta(seconds=30)
        dist.init_process_group("gloo", store=store, rank=number, world_size=RANKS, timeout=timeout)
        self.rank = Rank(number, number % per_node, RANKS, per_node, attempt)
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.mesh = init_device_mesh("cpu", (RANKS,))
        self.strategy = strategy
        own = folder / "disk" if per_node == RANKS else folder_of(folder / "disk", number // per_node)
        own.mkdir(parents=True, exist_ok=True)
        disk = NodeDisk(own, number % per_node, per_node) if per_node < RANKS else None  # as `_open_stores` does
        local = CheckpointStore(own, RUN, strict=True)
        self.stores = Stores(CheckpointStore(folder / "shared", RUN), local, disk)
        self.skipped: list[str] = []

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Those of FSDP: sharded ones, and one that every rank has and rank 0 saves."""
        found: dict[str, torch.Tensor] = {"model/a": distribute_tensor(WHOLE + step, self.mesh, [Shard(0)])}
        if self.rank.is_first:
            found["model/b"] = torch.full((3,), float(step))
        return found

    def save(self, step: int, writer: CheckpointWriter) -> None:
        assert self.stores.local is not None
        target = self.stores.local.path(step)
        info = CommitInfo(step=step, world_size=RANKS, strategy=self.strategy, run=RUN)
        if self.strategy == "ddp":
            if self.rank.is_first:
                writer.save({"state_dict": {"a": WHOLE + step, "b": torch.full((3,), float(step))}}, target, info)
        else:
            state = {"step": step, "optimizers": {"groups": [], "values": {}}}
            of_layout = CommitInfo(**{**vars(info), "layout": "sharded"})
            writer.save_sharded(self.tensors(step), state, target, of_layout, self.group)
        writer.wait()
        writer.raise_if_failed()

    @property
    def attempt(self) -> Any:
        directory = SimpleNamespace(
            events_of=lambda kind: [], add_event=lambda event: self.skipped.append(event.reason)
        )
        heartbeat = SimpleNamespace(count_progress=lambda: None)
        return SimpleNamespace(rank=self.rank, directory=directory, heartbeat=heartbeat)

    def restart(self) -> dict[str, Any]:
        """Return what is chosen, and whether this rank could load all that it needs."""
        chosen = newest_checkpoint.choose(self.attempt, self.stores, self.group, self.strategy)
        if chosen is None:
            return {"step": None, "skipped": self.skipped}
        stored = StoredCheckpoint(chosen.path)
        if self.strategy == "ddp":
            into: dict[str, torch.Tensor] = {"model/a": torch.zeros(11, 5), "model/b": torch.zeros(3)}
        else:
            into = {"model/a": distribute_tensor(torch.zeros(11, 5), self.mesh, [Shard(0)]), "model/b": torch.zeros(3)}
        stored.read(into)
        expected = self.tensors(chosen.step)["model/a"] if self.strategy != "ddp" else WHOLE + chosen.step
        part, whole = (getattr(one, "to_local", lambda one=one: one)() for one in (into["model/a"], expected))
        good = torch.equal(part, whole) and into["model/b"].tolist() == [float(chosen.step)] * 3
        place = str(chosen.path.parent.name)
        return {"step": chosen.step, "place": place, "good": good, "skipped": self.skipped}


def save_main(job: Job, fault: str | None) -> None:
    local, disk = job.stores.local, job.stores.disk
    assert local is not None
    assert disk is not None
    NodeCheckpoints(local, disk, job.strategy, job.attempt, job.group).record(job.stores.run.directory)  # as `choose`
    writer = CheckpointWriter(job.stores.run, asynchronous=True, attempt=job.rank.attempt, disk=disk)
    writer.on_committed = lambda checkpoint: after_save(job.stores, job.rank, checkpoint, keep_last=1)
    if job.rank.is_first:
        earlier = CheckpointWriter(job.stores.run, asynchronous=False)
        state = {"state_dict": {"a": WHOLE + 5, "b": torch.full((3,), 5.0)}}
        earlier.save(state, job.stores.run.path(5), CommitInfo(step=5, run=RUN))
    job.save(10, writer)
    arm(fault)
    job.save(20, writer)


def arm(fault: str | None) -> None:
    faults._reached.clear()
    if fault is not None:
        os.environ[faults.VARIABLE] = fault


def run(folder: Path, steps: list[list[Any]], strategy: str) -> list[Any]:
    results: list[Any] = []
    for attempt, (what, *arguments) in enumerate(steps):
        if what == "lose node":
            shutil.rmtree(folder / "disk" / f"node-{arguments[0]}")
            results.append(None)
        elif what == "damage":
            path = folder / "disk" / arguments[0]
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            results.append(None)
        else:
            fault, victim, per_node = [*arguments, None, None, None][:3]

            def rank_main(number: int) -> None:
                job = Job(folder, number, attempt, per_node or 2, strategy)  # noqa: B023
                armed = fault if number == victim else None  # noqa: B023
                if what == "save":  # noqa: B023
                    save_main(job, armed)
                else:
                    arm(armed)
                    found = json.dumps(job.restart())
                    (folder / f"found-{attempt}-{number}.json").write_text(found)  # noqa: B023
                os._exit(0)

            (folder / "shared").mkdir(parents=True, exist_ok=True)
            codes = fork(folder / f"attempt-{attempt}", RANKS, rank_main)
            seen = [folder / f"found-{attempt}-{number}.json" for number in range(RANKS)]
            found = [json.loads(path.read_text()) if path.exists() else None for path in seen]
            held = sorted(str(path.relative_to(folder / "disk")) for path in (folder / "disk").glob("*/step-*"))
            known = {name: [node for node, _ in nodes] for name, nodes in node_record.read(folder / "shared").items()}
            results.append({"codes": codes, "found": found, "held": held, "known": known})
    return results


if __name__ == "__main__":
    for number, (strategy, steps) in enumerate(json.loads(sys.argv[2])):
        folder = Path(sys.argv[1]) / str(number)
        folder.mkdir(parents=True)
        print(json.dumps(run(folder, steps, strategy)), flush=True)
