"""The samples that a rank reads, and their order: a function of (seed, epoch, position) and nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import Sampler

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.data.permutation import KeyedPermutation
from trainer.data.randomness import mix

Order = Callable[[int], torch.Tensor]
"""Maps an epoch to the sample ids of that epoch, the same on every rank."""
Lookup = Callable[[int, torch.Tensor], torch.Tensor]
"""Maps an epoch and `(count,)` positions in it to the sample ids there, the same on every rank."""
MOST_IN_TABLE = 2**22
"""Samples up to which the order of an epoch is a table, drawn with `torch.randperm`: 16 MB and 0.2 s.

Larger data get a `KeyedPermutation`. Runs from before there was one continue with a table: their checkpoints do not
have `KEYED` under "shuffle".
"""
KEYED: Literal["keyed"] = "keyed"
_LOOKED_UP = 2**14
"""Positions that are looked up together: per position, few take fifty times as long as many."""


class Batches(Sampler[Any], ABC):
    """Base class of samplers: the micro-batches of one rank, and the position among them.

    Each iteration is a new epoch, read from its beginning: an epoch that was left early (`limit_train_batches`, a
    loader combined with a shorter one) is not continued. Only the first iteration after `seek` or `load` starts in
    mid-epoch.

    Args:
        accumulate: Micro-batches per optimizer step (gradient accumulation).
    """

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        """Micro-batches per optimizer step."""
        self.on_batch: Callable[[int, int, list[Any]], None] | None = None
        """Called with (epoch, step, ids of this rank) when a micro-batch is handed out; steps count from 0."""
        self.num_requested = 0
        """Micro-batches that the loader has requested in this iteration."""
        self._epoch = 0
        self._delivered = 0
        self._sought = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the micro-batches of an epoch, at any position: Lightning compares its own count with it."""

    @abstractmethod
    def ids(self, epoch: int, batch: int) -> list[Any]:
        """Return the sample ids of a micro-batch."""

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and the number of its optimizer steps whose micro-batches have all been handed out."""
        if self._delivered >= len(self):
            return self._epoch + 1, 0
        return self._epoch, self._delivered // self.accumulate

    def seek(self, epoch: int, step: int) -> None:
        """Move the position to `step` of `epoch`. Takes effect at the next `iter()`."""
        carried, step = divmod(step, math.ceil(len(self) / self.accumulate))
        self._epoch, self._delivered, self._sought = epoch + carried, step * self.accumulate, True

    def begin(self) -> tuple[int, int]:
        """Begin an iteration; return its epoch and the index of its first micro-batch."""
        if not self._sought and self._delivered:
            self._epoch, self._delivered = self._epoch + 1, 0
        self._sought, self.num_requested = False, 0
        return self._epoch, self._delivered

    def delivered(self) -> None:
        """Count one micro-batch. The loader calls it when it hands one out, not when a worker prefetches one."""
        if self.on_batch is not None:
            self._report(self._delivered)
        self._delivered += 1

    def listen(self, on_batch: Callable[[int, int, list[Any]], None], not_trained: int) -> None:
        """Set `on_batch`, and call it for the last `not_trained` micro-batches that were handed out."""
        self.on_batch = on_batch
        for batch in range(max(0, self._delivered - not_trained), self._delivered):
            self._report(batch)

    def _report(self, batch: int) -> None:
        assert self.on_batch is not None
        self.on_batch(self._epoch, batch // self.accumulate, self.ids(self._epoch, batch))

    def state(self, not_trained: int, epoch_is_complete: bool) -> dict[str, int]:
        """Return the state that `load` takes.

        Args:
            not_trained: Micro-batches handed out that have not been trained on yet.
            epoch_is_complete: Whether the training's epoch is complete.
        """
        epoch, delivered = self._epoch, self._delivered - not_trained
        if epoch_is_complete and delivered:
            epoch, delivered = epoch + 1, 0
        # "step" is for code that does not count micro-batches
        return {
            "epoch": epoch,
            "step": delivered // self.accumulate,
            "batches": delivered,
            "accumulate": self.accumulate,
        }

    def load(self, state: dict[str, int]) -> None:
        """Restore the position of `state`: to the micro-batch if the accumulation is unchanged, else to the step."""
        if state.get("accumulate") == self.accumulate and state["batches"] <= len(self):
            self._epoch, self._delivered, self._sought = state["epoch"], state["batches"], True
        else:
            self.seek(state["epoch"], state["step"])


class _Block(NamedTuple):
    """Micro-batches of a rank that follow one another."""

    epoch: int
    first: int
    rows: torch.Tensor
    """Ids of the full micro-batches, `(batches, micro_batch)`."""
    rest: tuple[torch.Tensor, ...] = ()
    """Ids of each micro-batch of a smaller last step, which follow the full ones."""

    def get(self, epoch: int, batch: int) -> torch.Tensor | None:
        """Return the ids of a micro-batch; None if it is not in the block."""
        index = batch - self.first
        if epoch != self.epoch or not 0 <= index < len(self.rows) + len(self.rest):
            return None
        return self.rows[index] if index < len(self.rows) else self.rest[index - len(self.rows)]


class GlobalBatchSampler(Batches):
    """The micro-batches of one rank.

    The global batch of step s is `order[s*B:(s+1)*B]` at any world size; rank r takes the contiguous r-th part of it.
    The samples after the last full global batch of an epoch make a smaller last step, as in Lightning; with
    `drop_last`, or if the plan allows whole steps only, they are left out of that epoch. If they are not a multiple of
    the world size, the first samples of the epoch are repeated in that step, as in torch's DistributedSampler.

    Up to `MOST_IN_TABLE` samples, and with a custom `order`, an epoch's order is a table. Beyond, it is looked up for
    some micro-batches at a time, and neither memory nor time to the first batch depends on the number of samples.

    Args:
        num_samples: Samples in the dataset.
        plan: How the global batch is split.
        rank: Data-parallel rank.
        seed: Seed of the run.
        shuffle: Draw a new permutation in each epoch; else read in order.
        order: Replaces the built-in order, for a custom sampler.
        lookup: Replaces the built-in order, for a dataset that shuffles itself (`seeded.SupportsShuffle`).
        drop_last: Leave out the samples after the last full global batch.

    Raises:
        UserError: There are fewer samples than one step needs.
    """

    def __init__(
        self,
        num_samples: int,
        plan: BatchPlan,
        rank: int,
        seed: int,
        shuffle: bool = True,
        *,
        order: Order | None = None,
        lookup: Lookup | None = None,
        drop_last: bool = True,
    ) -> None:
        drop_last = drop_last or plan.whole_steps
        if num_samples < (plan.global_batch if drop_last else 1):
            raise UserError(
                f"data.batch_size={plan.global_batch}: there are only {num_samples} training samples",
                f"use data.batch_size={max(1, num_samples // plan.world_size) * plan.world_size} or less",
            )
        super().__init__(plan.accumulate)
        self.num_samples, self.plan, self.rank, self.seed = num_samples, plan, rank, seed
        self._is_keyed = shuffle and order is None and lookup is None and num_samples > MOST_IN_TABLE
        self._order, self._lookup = order, lookup
        if self._is_keyed:
            self._lookup = self._permuted
        elif order is None and lookup is None:
            self._order, self._lookup = (self._table, None) if shuffle else (None, _in_order)
        self.batch_size = plan.micro_batch
        """Lightning's DeepSpeed strategy reads it."""
        self.drop_last = drop_last
        self._full_steps, rest = divmod(num_samples, plan.global_batch)
        self._rest = 0 if drop_last else math.ceil(rest / plan.world_size)
        """Samples per rank in the smaller last step."""
        self._most_steps = self._full_steps + bool(self._rest)
        self.steps_per_epoch = self._most_steps
        self.tag = 0
        """If not 0, yield `epoch * tag + i` for i, so that a loader's worker processes know the epoch."""
        self._block: _Block | None = None

    def __len__(self) -> int:
        return self._batches_of(self.steps_per_epoch)

    @property
    def whole(self) -> int:
        """Micro-batches of an epoch without a limit."""
        return self._batches_of(self._most_steps)

    def _batches_of(self, steps: int) -> int:
        full = min(steps, self._full_steps) * self.plan.accumulate
        return full if steps <= self._full_steps else full + math.ceil(self._rest / self.plan.micro_batch)

    def limit_steps(self, steps: int) -> None:
        """End an epoch after `steps` optimizer steps at most."""
        self.steps_per_epoch = min(steps, self._most_steps)
        self._block = None

    def ids(self, epoch: int, batch: int) -> list[int]:
        """Return the sample ids of a micro-batch."""
        ids = None if self._block is None else self._block.get(epoch, batch)
        if ids is None and self._lookup is not None:  # leaves the block that is being read
            ids = self._look_up(self._lookup, epoch, batch, 1).get(epoch, batch)
        found: list[int] = (self._row(epoch, batch) if ids is None else ids).tolist()
        return found

    def state(self, not_trained: int, epoch_is_complete: bool) -> dict[str, Any]:
        """Return the state that `load` takes; it names the kind of shuffling unless that is a table."""
        return super().state(not_trained, epoch_is_complete) | ({"shuffle": KEYED} if self._is_keyed else {})

    def load(self, state: dict[str, Any]) -> None:
        """Restore the position of `state`, and the order in which its run has read large data so far."""
        if self._is_keyed and state.get("shuffle") != KEYED:
            self._is_keyed, self._order, self._lookup, self._block = False, self._table, None, None
        super().load(state)

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (epoch, ids of a micro-batch) from the position to the end of its epoch.

        Ids have shape `(micro_batch,)`.
        """
        epoch, first = self.begin()
        for batch in range(first, len(self)):
            self.num_requested += 1
            yield epoch, self._row(epoch, batch)

    def __iter__(self) -> Iterator[list[int]]:
        for epoch, ids in self.rows():
            yield (ids.long() + epoch * self.tag).tolist() if self.tag else ids.tolist()

    def _row(self, epoch: int, batch: int) -> torch.Tensor:
        """Return the ids of a micro-batch of this rank, shape `(micro_batch,)`.

        There are fewer if an epoch ends with a smaller step.
        """
        ids = None if self._block is None else self._block.get(epoch, batch)
        if ids is None:
            count = max(1, _LOOKED_UP // self.plan.micro_batch)
            if self._lookup is None:
                self._block = self._whole_epoch(epoch)
            else:
                self._block = self._look_up(self._lookup, epoch, batch - batch % count, count)
            ids = self._block.get(epoch, batch)
            assert ids is not None, "a micro-batch beyond the epoch"
        return ids

    def _whole_epoch(self, epoch: int) -> _Block:
        """Return all micro-batches of an epoch by its table."""
        assert self._order is not None
        plan, order = self.plan, self._order(epoch)
        steps = min(self.steps_per_epoch, self._full_steps)
        full = order[: steps * plan.global_batch].view(steps, plan.world_size, plan.accumulate * plan.micro_batch)
        rows = full[:, self.rank].reshape(-1, plan.micro_batch)
        rest = torch.split(order[self._positions_of_rest()], plan.micro_batch) if self._has_rest else ()
        return _Block(epoch, 0, rows, rest)

    def _look_up(self, lookup: Lookup, epoch: int, first: int, count: int) -> _Block:
        """Return up to `count` micro-batches of an epoch, and the smaller last step if it follows them."""
        plan, end = self.plan, min(self.steps_per_epoch, self._full_steps) * self.plan.accumulate
        batches = torch.arange(min(first, end), min(first + count, end))
        begins = batches // plan.accumulate * plan.global_batch
        begins += (self.rank * plan.accumulate + batches % plan.accumulate) * plan.micro_batch
        positions = (begins[:, None] + torch.arange(plan.micro_batch)).flatten()
        rows = lookup(epoch, positions).view(-1, plan.micro_batch)
        is_end = self._has_rest and first + count > end
        rest = torch.split(lookup(epoch, self._positions_of_rest()), plan.micro_batch) if is_end else ()
        return _Block(epoch, min(first, end), rows, rest)

    @property
    def _has_rest(self) -> bool:
        return self.steps_per_epoch > self._full_steps

    def _positions_of_rest(self) -> torch.Tensor:
        """Return this rank's positions after the full global batches, shape `(_rest,)`."""
        first = self._full_steps * self.plan.global_batch + self.rank * self._rest
        return torch.arange(first, first + self._rest) % self.num_samples

    def _table(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
        kind = torch.int32 if self.num_samples < 2**31 else torch.int64
        return torch.randperm(self.num_samples, generator=generator, dtype=kind)

    def _permuted(self, epoch: int, positions: torch.Tensor) -> torch.Tensor:
        return KeyedPermutation(self.num_samples, self.seed, epoch)(positions)


def _in_order(epoch: int, positions: torch.Tensor) -> torch.Tensor:
    return positions


class ListedBatches(Batches):
    """Batches made by a custom batch sampler, or units that stand for whole batches; each goes to one rank.

    Micro-batch n of rank r is the batch `n * world_size + r` of an epoch. The last batches, which not all ranks can
    have, are left out of that epoch.

    Args:
        listed: Maps an epoch to its batches, of all ranks together, the same on every rank.
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
        accumulate: Micro-batches per optimizer step.
        first_epoch: The epoch to begin with, unless `seek` or `load` say another.
    """

    def __init__(
        self,
        listed: Callable[[int], list[Any]],
        rank: int,
        world_size: int,
        accumulate: int,
        first_epoch: int = 0,
    ) -> None:
        super().__init__(accumulate)
        self.rank, self.world_size, self._listed, self._epoch = rank, world_size, listed, first_epoch
        self._cached: tuple[int, list[Any]] | None = None
        if not self._of(first_epoch):
            raise UserError(
                f"{len(listed(first_epoch))} training batches per epoch are too few for {world_size} ranks",
                "use fewer ranks, or smaller batches",
            )

    def __len__(self) -> int:
        return len(self._of(self._epoch))

    def ids(self, epoch: int, batch: int) -> list[Any]:
        """Return the sample ids of a micro-batch."""
        unit = self._of(epoch)[batch][1]
        return list(unit) if isinstance(unit, (list, tuple)) else [unit]

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (epoch, index of the batch in it, batch), which `seeded.SeededUnits` reads."""
        epoch, first = self.begin()
        for number, batch in self._of(epoch)[first:]:
            self.num_requested += 1
            yield epoch, number, batch

    def _of(self, epoch: int) -> list[tuple[int, Any]]:
        """Return this rank's (index, batch) pairs of an epoch."""
        if self._cached is None or self._cached[0] != epoch:
            listed = self._listed(epoch)
            most = len(listed) // self.world_size * self.world_size
            self._cached = epoch, list(enumerate(listed))[self.rank : most : self.world_size]
        return self._cached[1]


class EvaluationBatches(Sampler[list[int]]):
    """Every sample once over all ranks, with the same number of batches, none of them empty, on every rank.

    Padding with repeated samples would make the metrics depend on the world size; a rank with fewer batches would leave
    the others waiting in a collective. So the shares of the ranks differ by at most one sample, and each is cut into as
    many batches as the largest needs; the last may be smaller.

    Rank r gets the r-th part of each global batch. So an evaluation that ends early (`limit_val_batches`, a loader
    combined with a shorter one) reads the same samples as in Lightning.

    Args:
        num_samples: Samples in the dataset.
        batch_size: Maximum number of samples per batch on a rank (with 1, some batches hold 2).
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        if num_samples < world_size:
            raise UserError(
                f"{num_samples} evaluation samples are too few for {world_size} ranks",
                "use fewer ranks, or trainer.limit_val_batches=0 to disable validation",
            )
        self.num_samples, self.rank, self.world_size = num_samples, rank, world_size
        self.begin = num_samples * rank // world_size
        """Samples of the ranks before this one."""
        self.samples = num_samples * (rank + 1) // world_size - self.begin
        largest = -(-num_samples // world_size)
        self.batches = min(-(-largest // batch_size), num_samples // world_size)
        self.batch_size = -(-largest // self.batches)
        self.drop_last = False
        self.order: torch.Tensor | None = None
        """Sample ids of shape `(num_samples,)`; None: 0, 1, 2, ..."""
        self.is_contiguous = False
        """Read the rank's share from one place, for a prediction, whose outputs are written in the order of samples."""

    def __len__(self) -> int:
        return self.batches

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (0, ids of a batch).

        The epoch is always 0: random evaluation data, too, are the same in every epoch.
        """
        fewest, num_larger = divmod(self.num_samples, self.world_size)
        larger_before = self.begin - fewest * self.rank
        for batch in range(self.batches):
            start, end = self._cut(self.samples, batch), self._cut(self.samples, batch + 1)
            if self.is_contiguous:
                first = self.begin + start
            else:
                smaller, larger = [self._cut(share, batch) for share in (fewest, fewest + 1)]
                first = smaller * (self.world_size - num_larger) + larger * num_larger  # the batches before
                size, larger_size = self._cut(fewest, batch + 1) - smaller, self._cut(fewest + 1, batch + 1) - larger
                first += size * (self.rank - larger_before) + larger_size * larger_before  # the ranks before
            share = slice(first, first + end - start)
            yield 0, torch.arange(share.start, share.stop) if self.order is None else self.order[share]

    def _cut(self, share: int, batch: int) -> int:
        """Return how many of a rank's `share` samples are in the batches before `batch`."""
        return min(batch * self.batch_size, share - (self.batches - batch))

    def __iter__(self) -> Iterator[list[int]]:
        for _, ids in self.rows():
            yield ids.tolist()
