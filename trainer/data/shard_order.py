"""The order of an epoch in which windows of the same few shards follow one another."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch

from trainer.data.permutation import KeyedPermutation
from trainer.data.randomness import mix


class _Epoch(NamedTuple):
    shards: numpy.ndarray
    """Shards in the order of the epoch."""
    ends: numpy.ndarray
    """Position at which each of them would end, were the windows not shuffled."""
    group_ends: numpy.ndarray
    """Position at which each group of shards ends."""


class ShardOrder:
    """Shuffles the shards, and then the windows of each `group` of shards that follow one another.

    So a node needs two groups at a time: one to read from, and the next. Like any other order it is a function of seed,
    epoch and position, and the same at any world size.

    Args:
        windows: Windows of each shard.
        group: Shards whose windows are shuffled together.
        seed: Seed of the run.
    """

    def __init__(self, windows: numpy.ndarray, group: int, seed: int) -> None:
        self.group, self.seed = group, seed
        self._windows = windows.astype(numpy.int64)
        self._begins = numpy.cumsum(self._windows) - self._windows
        self._epochs: dict[int, _Epoch] = {}

    def __call__(self, epoch: int, positions: torch.Tensor) -> torch.Tensor:
        """Return the windows at `(count,)` positions of an epoch."""
        order, places = self._epoch(epoch), positions.numpy()
        groups = numpy.searchsorted(order.group_ends, places, side="right")
        shuffled = numpy.empty(len(places), numpy.int64)
        for group in numpy.unique(groups).tolist():
            begin = int(order.group_ends[group - 1]) if group else 0
            permutation = KeyedPermutation(int(order.group_ends[group]) - begin, self.seed, epoch, group)
            mine = groups == group
            shuffled[mine] = begin + permutation(torch.from_numpy(places[mine] - begin)).numpy()
        turns = numpy.searchsorted(order.ends, shuffled, side="right")
        shards = order.shards[turns]
        return torch.from_numpy(self._begins[shards] + shuffled - (order.ends[turns] - self._windows[shards]))

    def needed(self, epoch: int, shard: int) -> tuple[list[int], list[int]]:
        """Return the shards of the group that `shard` belongs to in an epoch, and those of the group that follows."""
        shards = self._epoch(epoch).shards
        begin = int(numpy.flatnonzero(shards == shard)[0]) // self.group * self.group
        end = begin + self.group
        following = shards[end : end + self.group] if end < len(shards) else self._epoch(epoch + 1).shards[: self.group]
        return shards[begin:end].tolist(), following.tolist()

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
            shards = torch.randperm(len(self._windows), generator=generator).numpy()
            ends = numpy.cumsum(self._windows[shards])
            last = numpy.append(numpy.arange(self.group, len(shards), self.group), len(shards)) - 1
            self._epochs = {key: order for key, order in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = _Epoch(shards, ends, ends[last])
        return self._epochs[epoch]
