"""Datasets whose samples see seeded generators, and the protocols that they use.

A worker process unpickles one of these datasets before anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate

from trainer.data.randomness import generators_untouched, seed_sample
from trainer.runtime import frozen, namespaces

# A rank has already done this. A spawned worker process has not: it imports this file, which unpickling the dataset
# needs, before it imports the user's code.
frozen.install()
namespaces.install()


@runtime_checkable
class SupportsGather(Protocol):
    """A dataset of fixed-width samples that makes a collated batch in one call.

    It is read in the process of the rank: a worker process costs about 33 microseconds per 8 KB sample, ten times what
    the whole read takes here.
    """

    def __len__(self) -> int: ...

    def gather(self, indices: torch.Tensor, epoch: int) -> Any:
        """Return the batch of the `(batch,)` sample ids. Anything random in it is a function of seed, epoch and id."""
        ...


def supports_gather(dataset: object) -> bool:
    """Return whether the dataset is a `SupportsGather`.

    A tensor, which may be a dataset, has another method `gather`, and a wrapper of a dataset may delegate to it.
    """
    has_gather = isinstance(dataset, SupportsGather) and hasattr(type(dataset), "gather")
    return has_gather and not isinstance(dataset, torch.Tensor)


@runtime_checkable
class SupportsShuffle(Protocol):
    """A dataset that knows a better order than any, such as one in which samples of the same file are near."""

    def lookup_order(self, seed: int) -> Callable[[int, torch.Tensor], torch.Tensor] | None:
        """Return a function from an epoch and `(count,)` positions in it to sample ids; None: any order will do.

        Each epoch is a permutation of the samples, the same in every process.
        """
        ...


def lookup_order(dataset: object, seed: int) -> Callable[[int, torch.Tensor], torch.Tensor] | None:
    """Return the order of a dataset that is a `SupportsShuffle`; None: any order will do."""
    is_one = isinstance(dataset, SupportsShuffle) and hasattr(type(dataset), "lookup_order")
    return dataset.lookup_order(seed) if is_one else None  # type: ignore[attr-defined]


@runtime_checkable
class SupportsOfEpoch(Protocol):
    """A dataset in which an index refers to a different sample in each epoch."""

    def of_epoch(self, epoch: int, index: int) -> Any:
        """Return the sample at `index` in `epoch`."""
        ...


class SeededBatches(Dataset[Any]):
    """A dataset whose `dataset[i]` sees generators seeded by (seed, epoch, i), with and without workers.

    It also collates: a random collate function then continues from the state of its last sample, not from that of a
    worker process, which does not survive a resume. Indices come as `epoch * len(dataset) + i`: a worker has no other
    way to learn the epoch. A dataset that draws no random numbers sets `random = False`; then, with the default collate
    function, nothing is seeded.

    Args:
        dataset: The user's dataset.
        collate: Makes a batch of a list of samples.
        seed: Seed of the run.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.length = len(dataset)  # type: ignore[arg-type]
        self.seeds = getattr(dataset, "random", True) is not False or collate is not default_collate
        self.fetch_many = getattr(dataset, "__getitems__", None)
        # Checked once, not per sample: isinstance with a protocol takes several microseconds on Python 3.11.
        self.of_epoch = dataset.of_epoch if isinstance(dataset, SupportsOfEpoch) else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, tagged: int) -> Any:
        return self.__getitems__([tagged])

    def __getitems__(self, tagged: Sequence[int]) -> Any:
        """Return a collated batch.

        If the dataset may be random, its own `__getitems__` gets one index at a time: which samples share a batch
        depends on the world size, and a sample must not.
        """
        pairs = [divmod(number, self.length) for number in tagged]
        if not self.seeds:
            ids = [index for _, index in pairs]
            return self.collate(self.fetch_many(ids) if self.fetch_many else [self._one(*pair) for pair in pairs])
        with generators_untouched():
            return self.collate([self._seeded(epoch, index) for epoch, index in pairs])

    def _seeded(self, epoch: int, index: int) -> Any:
        seed_sample(self.seed, epoch, index)
        return self.fetch_many([index])[0] if self.fetch_many else self._one(epoch, index)

    def _one(self, epoch: int, index: int) -> Any:
        return self.dataset[index] if self.of_epoch is None else self.of_epoch(epoch, index)


class SeededUnits(Dataset[Any]):
    """Like `SeededBatches`, for batches of a custom batch sampler (`ListedBatches`), or with `batch_size=None`.

    Args:
        loader: The user's loader.
        seed: Seed of the run.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = loader.dataset, loader.collate_fn, seed
        self.makes_batches = loader.batch_sampler is not None
        """Whether a unit is a list of indices whose samples are collated; else it is an index of a whole batch."""
        self.fetch_many = getattr(loader.dataset, "__getitems__", None) if self.makes_batches else None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, unit: tuple[int, int, Any]) -> Any:
        return self.__getitems__(unit)

    def __getitems__(self, unit: tuple[int, int, Any]) -> Any:
        """Return a collated batch."""
        epoch, number, indices = unit
        with generators_untouched():
            seed_sample(self.seed, epoch, number)
            if not self.makes_batches:
                return self.collate(self.dataset[indices])
            return self.collate(self.fetch_many(indices) if self.fetch_many else [self.dataset[one] for one in indices])
