"""What a sharded save takes of coordination, with simulated ranks: threads that run the code of a save.

Their process group hands objects from thread to thread and counts what gloo would send. Each rank has one row of each
of `TENSORS` tensors, and writes it to a temporary folder.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainer.checkpoint.commit import COMMIT, CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.shard_index import NAME, SHARDS
from trainer.checkpoint.store import CheckpointStore

SIZES = (8, 64, 512)
TENSORS = 8
_STACK_BYTES = 512 << 10


class SimulatedRanks:
    """Takes the place of the object collectives of `torch.distributed` for ranks that are threads."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._own = threading.local()
        self._values: list[Any] = [None] * ranks
        self._sizes = [0] * ranks
        self._barrier = threading.Barrier(ranks)
        self.calls: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        """Bytes that rank 0 receives, and that another rank receives; objects are padded to the largest."""

    def join(self, rank: int) -> None:
        """Make this thread a rank."""
        self._own.rank = rank

    def abort(self) -> None:
        """End the waits of all ranks."""
        self._barrier.abort()

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace the functions of `torch.distributed` until the end of the block."""
        functions = {
            "is_initialized": lambda: True,
            "get_rank": lambda *_: self._own.rank,
            "get_world_size": lambda *_: self.ranks,
            "get_backend": lambda *_: "gloo",  # this and the next for torch's log of calls
            "_get_process_group_name": lambda *_: "simulated",
            "get_global_rank": lambda _group, rank: rank,
            "all_gather_object": self._all_gather,
            "gather_object": self._gather,
            "scatter_object_list": self._scatter,
            "broadcast_object_list": self._broadcast,
        }
        with mock.patch.multiple(dist, **functions):
            yield

    def _exchange(self, name: str, value: Any, to_first: int, to_others: int) -> list[Any]:
        """Return the values of all ranks, and count the largest of them so many times."""
        rank = self._own.rank
        self._values[rank], self._sizes[rank] = value, len(pickle.dumps(value))
        if self._barrier.wait() == 0:
            largest = max(self._sizes)
            self.calls[name] += 1
            self.received["first"] += largest * to_first
            self.received["other"] += largest * to_others
        self._barrier.wait()
        values = list(self._values) if to_others > 1 or rank == 0 else [self._values[0]]
        self._barrier.wait()
        return values

    def _all_gather(self, object_list: list[Any], obj: Any, **_: Any) -> None:
        object_list[:] = self._exchange("all-gather", obj, self.ranks, self.ranks)

    def _gather(self, obj: Any, object_gather_list: list[Any] | None = None, **_: Any) -> None:
        values = self._exchange("gather", obj, self.ranks, 0)
        if object_gather_list is not None:
            object_gather_list[:] = values

    def _scatter(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None = None, **_: Any
    ) -> None:
        parts = scatter_object_input_list
        # Rank 0 has all parts and passes the list on by reference; what gloo sends of it is one part per rank.
        sent = self._exchange("scatter", _Parts(parts), 0, 1)[0].parts
        scatter_object_output_list[0] = sent[self._own.rank]

    def _broadcast(self, object_list: list[Any], **_: Any) -> None:
        object_list[:] = self._exchange("broadcast", list(object_list) if self._own.rank == 0 else None, 0, 1)[0]


class _Parts:
    """The parts of a scatter; its pickle is that of the first one."""

    def __init__(self, parts: list[Any] | None) -> None:
        self.parts = parts or []

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return (list, (self.parts[:1],))


def save(ranks: int, folder: Path) -> dict[str, float]:
    """Save once on `ranks` simulated ranks, and return what was counted."""
    simulated = SimulatedRanks(ranks)
    group: Any = object()
    store = CheckpointStore(folder / "checkpoints")
    seconds, problems = [0.0] * ranks, []

    def rank_main(rank: int) -> None:
        simulated.join(rank)
        try:
            mesh = DeviceMesh("cpu", torch.arange(ranks), _init_backend=False, _rank=rank)
            row = torch.zeros(1, 8)
            tensors: dict[str, torch.Tensor] = {
                f"model/blocks.{number}.weight": DTensor.from_local(
                    row, mesh, [Shard(0)], run_check=False, shape=torch.Size([ranks, 8]), stride=(8, 1)
                )
                for number in range(TENSORS)
            }
            writer = CheckpointWriter(store, asynchronous=False)
            began = time.thread_time()
            writer.save_sharded(tensors, {"optimizers": {}}, store.path(1), CommitInfo(step=1, world_size=ranks), group)
            seconds[rank] = time.thread_time() - began
            writer.raise_if_failed()
        except BaseException as error:
            problems.append(error)
            simulated.abort()

    before = threading.stack_size(_STACK_BYTES)
    with simulated.replaced():
        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    threading.stack_size(before)
    if problems:
        raise problems[0]
    path = store.path(1)
    return {
        "files": sum(one.is_file() for one in path.rglob("*")),
        "calls": simulated.calls.total(),
        "first_kb": simulated.received["first"] / 1e3,
        "other_kb": simulated.received["other"] / 1e3,
        "index_kb": (path / SHARDS / NAME).stat().st_size / 1e3,
        "commit_kb": (path / COMMIT).stat().st_size / 1e3,
        "first_s": seconds[0],
        "other_s": sorted(seconds)[ranks // 2],
    }


def save_table(sizes: Sequence[int]) -> str:
    """Return the table of saves."""
    lines = [
        "| ranks | files | collectives | KB to rank 0 | KB to another rank | index KB | COMMIT KB | CPU s of rank 0 |"
        " CPU s of another |",
        "|" + "---|" * 9,
    ]
    for ranks in sizes:
        with tempfile.TemporaryDirectory() as folder:
            one = save(ranks, Path(folder))
        cells = [f"{ranks:,}", f"{one['files']:,.0f}", f"{one['calls']:.0f}"]
        cells += [f"{one[key]:,.1f}" for key in ("first_kb", "other_kb", "index_kb", "commit_kb")]
        cells += [f"{one[key]:.3f}" for key in ("first_s", "other_s")]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)
