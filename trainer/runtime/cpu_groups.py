"""CPU (gloo) groups of all ranks, and reductions and gathers on them that take few hops in a large job.

gloo connects each rank with each other rank, and reduces around a ring: both grow with the number of ranks
(benchmarks/results/agreement.md). In jobs of more than `FULL_MESH_UP_TO` ranks, two ranks are connected when they first
exchange something (`TORCH_GLOO_LAZY_INIT`), and `all_reduce` and `gather` use a tree: groups of `FAN_OUT` ranks, groups
of the first ranks of these, and so on.

A group is used once when it is made. gloo limits the wait for a message, and the wait to be connected only on one of
the two sides (https://github.com/pytorch/gloo/issues/520): a rank could otherwise wait without an end for another one
that has stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.runtime.process import FULL_MESH_UP_TO

FAN_OUT = 8
"""Ranks of a group of the tree. Ranks are numbered by node, so that of eight GPUs each lowest group is one node."""

Group = dist.ProcessGroup
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Branch:
    """One of the tree's groups that this rank is in."""

    group: Group
    leader: int
    """Rank that passes results up and down."""
    is_top: bool


class _Tree:
    """The tree beside a group of all ranks.

    What is done on it is done by one thread in the order of the calls, as gloo does it for one group: the ranks then do
    it in the same order, although a reduction that was started may still be waiting when the next call comes.
    """

    def __init__(self, branches: list[_Branch]) -> None:
        self.branches = branches
        """From the bottom to the top."""
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        # A daemon: a rank that fails exits without waiting for the others.
        threading.Thread(target=self._run, name="tree-of-ranks", daemon=True).start()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Have the thread make a call after all earlier ones."""
        future: Future[Result] = Future()
        self._calls.put((future, call))
        return future

    def reduce(self, values: torch.Tensor, op: Any) -> None:
        """Reduce up the tree, and pass the result down."""
        for branch in self.branches:
            dist.all_reduce(values, op, group=branch.group)
        for branch in reversed(self.branches):
            if not branch.is_top:
                dist.broadcast(values, src=branch.leader, group=branch.group)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of the ranks below this one, itself included."""
        values = [value]
        for branch in self.branches:
            parts = _gather(values, branch.group, branch.leader)
            if not parts:
                break
            values = [one for part in parts for one in part]
        return values

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


_trees: dict[Group, _Tree] = {}


def new_group(timeout: timedelta | None = None, with_tree: bool = False) -> Group:
    """Make a gloo group of all ranks. Collective.

    Args:
        timeout: Timeout of its collectives; None: torch's default.
        with_tree: Whether `all_reduce` and `gather` will be used on it, in place of torch's.
    """
    group: Group = dist.new_group(backend="gloo", timeout=timeout)
    world_size = dist.get_world_size(group)
    if world_size > FULL_MESH_UP_TO:
        connect(group)
        if with_tree:
            _trees[group] = _Tree(_branches(dist.get_rank(group), world_size, timeout))
            all_reduce(torch.zeros(1), dist.ReduceOp.MAX, group)
        else:
            _gather(None, group, 0)
    return group


def connect(group: Group | None = None) -> None:
    """Use a group once for what it will be used for, so that the ranks are connected. Collective.

    Args:
        group: None: the default group.
    """
    values = torch.zeros(1)
    dist.all_reduce(values, group=group)
    dist.broadcast(values, src=0, group=group)
    if group is not None:  # the default group may use NCCL for a barrier
        dist.barrier(group)


def all_reduce(values: torch.Tensor, op: Any, group: Group) -> None:
    """Reduce `values`, a small tensor in host memory, over all ranks in place, as `torch.distributed.all_reduce`."""
    start_all_reduce(values, op, group)()


def start_all_reduce(values: torch.Tensor, op: Any, group: Group) -> Callable[[], object]:
    """Start to reduce `values` in place, and return a function that waits until it is done."""
    tree = _trees.get(group)
    if tree is not None:
        return tree.submit(lambda: tree.reduce(values, op)).result
    work = dist.all_reduce(values, op, group=group, async_op=True)
    assert work is not None  # this rank is in the group
    waits: Callable[[], object] = work.wait
    return waits


def gather(value: Any, group: Group | None) -> list[Any]:
    """Return the `value` of each rank, in rank order, on rank 0, and on other ranks those of some. Collective.

    Args:
        value: An object that can be pickled.
        group: A group of all ranks; None: one rank.
    """
    if group is None:
        return [value]
    tree = _trees.get(group)
    if tree is not None:
        return tree.submit(lambda: tree.gather(value)).result()
    return _gather(value, group, 0) or [value]


def _gather(value: Any, group: Group, leader: int) -> list[Any]:
    """Return the values of a group's ranks on its leader, and nothing on the others."""
    values: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == leader else None
    dist.gather_object(value, values, dst=leader, group=group)
    return values or []


def members(rank: int, world_size: int) -> list[list[int]]:
    """Return the ranks of each group of the tree that `rank` is in, from the bottom to the top."""
    found, stride = [], 1
    while stride < world_size and rank % stride == 0:
        first = rank - rank % (stride * FAN_OUT)
        group = list(range(first, min(first + stride * FAN_OUT, world_size), stride))
        if len(group) > 1:
            found.append(group)
        stride *= FAN_OUT
    return found


def _branches(rank: int, world_size: int, timeout: timedelta | None) -> list[_Branch]:
    top = members(0, world_size)[-1]
    branches = []
    for ranks in members(rank, world_size):
        # Only its members make a group: one store request each, where otherwise all ranks make all groups.
        group = dist.new_group(
            ranks,
            timeout=timeout,
            backend="gloo",
            use_local_synchronization=True,
            group_desc=f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}",
        )
        branches.append(_Branch(group, ranks[0], ranks == top))
    # torch derives the names of later groups that only their members make, and of those that NCCL splits off, from the
    # number of groups that a rank is in. Members with different numbers would wait for each other under two names.
    for level in range(len(branches), len(members(0, world_size))):
        dist.new_group(
            [rank],
            timeout=timeout,
            backend="gloo",
            use_local_synchronization=True,
            group_desc=f"rank {rank} alone, in place of a group of level {level}",
        )
    return branches
