"""Which samples a rank reads, in which order: a function of (seed, epoch, position) and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from trainer.config.batch import BatchPlan
from trainer.data.randomness import mix
from trainer.errors import UserError

Order = Callable[[int], torch.Tensor]
"""Epoch to the sample ids of that epoch, the same on every rank."""


class GlobalBatchSampler(Sampler[list[int]]):
    """The micro-batches of one rank.

    The global batch of step s is `order[s*B:(s+1)*B]`, at any world size; rank r takes the contiguous r-th part
    of it. The samples after the last full global batch of an epoch are left out of that epoch.

    Needs 4 bytes a sample while an epoch's order is drawn (8 from 2^31 samples) and that divided by the world
    size afterwards; 10^8 samples take about two seconds an epoch.
    """

    def __init__(
        self,
        num_samples: int,
        plan: BatchPlan,
        rank: int,
        seed: int,
        shuffle: bool = True,
        order: Order | None = None,
    ) -> None:
        """`order` replaces the built-in one, for a sampler of the user's own."""
        if num_samples < plan.global_batch:
            raise UserError(
                f"data.batch_size={plan.global_batch} is more than the {num_samples} training samples",
                f"use data.batch_size={max(1, num_samples // plan.world_size) * plan.world_size} or less",
            )
        self.num_samples, self.plan, self.rank, self.seed = num_samples, plan, rank, seed
        self.shuffle = shuffle
        self._order = order or self._built_in_order
        self.batch_size = plan.micro_batch
        """Lightning's DeepSpeed strategy reads it."""
        self.drop_last = True
        self.steps_per_epoch = num_samples // plan.global_batch
        self.tag_epoch = False
        """Yield `epoch * num_samples + i` for i, so that a loader's worker processes know the epoch."""
        self.on_batch: Callable[[int, int, list[int]], None] | None = None
        """Called with (epoch, step, ids of this rank) as each micro-batch is handed out; steps count from 0."""
        self._epoch = 0
        self._delivered = 0
        self._rows: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        """Micro-batches of an epoch, wherever the position is: Lightning compares its own count with it."""
        return self.steps_per_epoch * self.plan.accumulate

    def limit_steps(self, steps: int) -> None:
        """Let an epoch end after so many optimizer steps at most."""
        self.steps_per_epoch = min(steps, self.num_samples // self.plan.global_batch)
        self._rows = None

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, optimizer steps of it whose micro-batches have all been handed out)."""
        carried, step = divmod(self._delivered // self.plan.accumulate, self.steps_per_epoch)
        return self._epoch + carried, step

    def seek(self, epoch: int, step: int) -> None:
        """Make `step` of `epoch` the next one to be read. Takes effect at the next `iter()`."""
        carried, step = divmod(step, self.steps_per_epoch)
        self._epoch, self._delivered = epoch + carried, step * self.plan.accumulate

    def delivered(self) -> None:
        """Count one micro-batch. The loader calls it as it hands one out, not when a worker fetches one early."""
        if self.on_batch is not None:
            ids = self._rows_of(self._epoch)[self._delivered].tolist()
            self.on_batch(self._epoch, self._delivered // self.plan.accumulate, ids)
        self._delivered += 1

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(epoch, ids of a micro-batch) from the position to the end of its epoch."""
        epoch, step = self.position
        self.seek(epoch, step)
        rows = self._rows_of(epoch)
        for row in range(step * self.plan.accumulate, len(self)):
            yield epoch, rows[row]

    def __iter__(self) -> Iterator[list[int]]:
        for epoch, ids in self.rows():
            yield (ids.long() + epoch * self.num_samples).tolist() if self.tag_epoch else ids.tolist()

    def _rows_of(self, epoch: int) -> torch.Tensor:
        """The ids of this rank in `epoch`, (len(self), micro_batch)."""
        if self._rows is None or self._rows[0] != epoch:
            plan = self.plan
            order = self._order(epoch)[: self.steps_per_epoch * plan.global_batch]
            mine = order.view(self.steps_per_epoch, plan.world_size, -1)[:, self.rank]
            self._rows = epoch, mine.reshape(len(self), plan.micro_batch)
        return self._rows[1]

    def _built_in_order(self, epoch: int) -> torch.Tensor:
        kind = torch.int32 if self.num_samples < 2**31 else torch.int64
        if not self.shuffle:
            return torch.arange(self.num_samples, dtype=kind)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
        return torch.randperm(self.num_samples, generator=generator, dtype=kind)


class EvaluationBatches(Sampler[list[int]]):
    """Every sample once over all ranks, and the same number of batches, none of them empty, on every rank.

    Padding with repeated samples would make the metrics depend on the world size; a rank with fewer batches
    would leave the others waiting in a collective. So each rank takes a contiguous share (they differ by at most
    one sample) and cuts it into as many batches as the largest share needs; the last may be smaller.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        """`batch_size`: the most samples of a batch on a rank (with 1, some batches hold 2)."""
        if num_samples < world_size:
            raise UserError(
                f"{num_samples} evaluation samples cannot be shared by {world_size} ranks",
                "use fewer ranks, or trainer.limit_val_batches=0 to go without validation",
            )
        self.num_samples = num_samples
        self.begin = num_samples * rank // world_size
        self.samples = num_samples * (rank + 1) // world_size - self.begin
        largest = -(-num_samples // world_size)
        self.batches = min(-(-largest // batch_size), num_samples // world_size)
        self.batch_size = -(-largest // self.batches)
        self.drop_last = False
        self.tag_epoch = False

    def __len__(self) -> int:
        return self.batches

    def delivered(self) -> None:
        """An evaluation has no position: it always starts at the beginning."""

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(0, ids of a batch): random evaluation data, too, are the same in every epoch."""
        begin = 0
        for left in range(self.batches - 1, -1, -1):
            end = min(begin + self.batch_size, self.samples - left)
            yield 0, torch.arange(self.begin + begin, self.begin + end)
            begin = end

    def __iter__(self) -> Iterator[list[int]]:
        for _, ids in self.rows():
            yield ids.tolist()
