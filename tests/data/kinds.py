"""Loaders of every kind, as users write them. A sample is its own id, so that a batch tells who was read."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


class Ids(Dataset[int]):
    def __init__(self, count: int = 48, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        return self.first + torch.tensor(index) if isinstance(index, list) else self.first + index


class Stream(IterableDataset[int]):
    """`sharded`: by its own look at the ranks. Shuffles without a seed."""

    def __init__(self, count: int = 48, sharded: bool = False, more_on_first: int = 0, sized: bool = False) -> None:
        self.count, self.sharded, self.more_on_first = count, sharded, more_on_first
        if sized:
            self.__class__ = SizedStream

    def __iter__(self) -> Iterator[int]:
        ids = list(range(self.count))
        worker = torch.utils.data.get_worker_info()
        if worker is None:  # workers draw different numbers
            random.shuffle(ids)
        ids = ids[worker.id :: worker.num_workers] if worker else ids
        mine = ids[rank() :: world_size()] if self.sharded else ids
        return iter(mine + [1000 + number for number in range(self.more_on_first if rank() == 0 else 0)])


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.count // world_size() if self.sharded else self.count


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class Subclass(DataLoader[Any]):
    """As torch_geometric's: an `__init__` of its own, which sets the collate function."""

    def __init__(self, dataset: Any, size: int, shuffle: bool = False) -> None:
        super().__init__(dataset, batch_size=size, shuffle=shuffle, collate_fn=torch.tensor)


class Moving(DataLoader[Any]):
    """An `__iter__` of its own."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield batch.long()


class Forever(DataLoader[Any]):
    """As timm's: the workers live on, because the batch sampler never ends."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        object.__setattr__(self, "batch_sampler", Repeated(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for _ in range(len(self)):
            yield next(self.iterator)


class Repeated:
    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from iter(self.sampler)


class Stateful(DataLoader[Any]):
    """Resumes by itself, to the batch."""

    done = resumed_at = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        first, self.resumed_at, self.done = self.resumed_at, 0, 0
        for self.done, batch in enumerate(super().__iter__(), start=1):
            if self.done > first:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "rank": rank(), "more": (b"\x01", {3}, torch.arange(2).numpy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["rank"] == rank()
        assert state["more"][:2] == (b"\x01", {3})
        self.resumed_at = state["done"]


class Shuffled(Sampler[int]):
    """A sampler of the user's own; `mine`: which already gives each rank its share."""

    def __init__(self, count: int, mine: bool = False) -> None:
        self.count, self.mine, self.epoch = count, mine, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // world_size() if self.mine else self.count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(order[rank() :: world_size()] if self.mine else order)


class Buckets(Sampler[list[int]]):
    """Batches of 3 and of 5 samples, in another order each epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(8 * n, 8 * n + 3)) for n in range(6)]
        batches += [list(range(8 * n + 3, 8 * n + 8)) for n in range(6)]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return 12


class Pairs(Sampler[tuple[int, int]]):
    """Indices that are no numbers."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(index, 7) for index in torch.randperm(48).tolist()])

    def __len__(self) -> int:
        return 48


class ByPair(Ids):
    def __getitem__(self, index: Any) -> Any:
        return index[0]


class Generated:
    """Any object that can be iterated."""

    def __iter__(self) -> Iterator[Any]:
        return iter([torch.arange(4 * n, 4 * n + 4) for n in range(12)])


@dataclass
class Kind:
    make: Callable[[], Any]
    ids: list[int] | None = None
    """Of an epoch over all ranks, sorted; None: each once of 0..47."""
    batch: int = 4
    accumulate: int = 1


def balanced() -> Any:
    weights = [0.0] * 24 + [1.0] * 24
    return DataLoader(Ids(), 4, sampler=WeightedRandomSampler(weights, 48))


def two(mode: str) -> Any:
    """12 batches on one rank's side of `a`, 8 of `b`: 6 and 4 on each of two."""
    both = {"a": DataLoader(Ids(), 4, shuffle=True), "b": DataLoader(Ids(32, 100), 4, shuffle=True)}
    return CombinedLoader(both, mode)  # type: ignore[arg-type]


A, B = list(range(48)), list(range(100, 132))
KINDS: dict[str, Kind] = {
    "plain": Kind(lambda: DataLoader(Ids(), 4, shuffle=True)),
    "workers": Kind(lambda: DataLoader(Ids(), 4, shuffle=True, num_workers=1)),
    "subclass": Kind(lambda: Subclass(Ids(), 4, shuffle=True)),
    "own iter": Kind(lambda: Moving(Ids(), 4, shuffle=True)),
    "endless sampler": Kind(lambda: Forever(Ids(), batch_size=4)),
    "distributed sampler": Kind(
        lambda: DataLoader(Ids(), 4, sampler=DistributedSampler(Ids()) if world_size() > 1 else None)
    ),
    "own sampler": Kind(lambda: DataLoader(Ids(), 4, sampler=Shuffled(48))),
    "own distributed sampler": Kind(lambda: DataLoader(Ids(), 4, sampler=Shuffled(48, mine=True))),
    "part": Kind(lambda: DataLoader(Ids(), 4, sampler=SubsetRandomSampler(range(16))), ids=list(range(16))),
    "with replacement": Kind(
        lambda: DataLoader(Ids(), 4, sampler=RandomSampler(Ids(), replacement=True, num_samples=24)), ids=[]
    ),
    "weighted": Kind(balanced, ids=[]),
    "own batch sampler": Kind(lambda: DataLoader(Ids(), batch_sampler=Buckets())),
    "indices that are pairs": Kind(lambda: DataLoader(ByPair(), 4, sampler=Pairs())),
    "no batch size": Kind(lambda: DataLoader(Ids(), batch_size=None, sampler=BatchSampler(Shuffled(48), 4, False))),
    "any iterable": Kind(lambda: Generated()),
    "tensor": Kind(lambda: torch.arange(48)),
    "stream": Kind(lambda: DataLoader(Stream(), 4)),
    "sized stream": Kind(lambda: DataLoader(Stream(sized=True), 4)),
    "stream with workers": Kind(lambda: DataLoader(Stream(), 4, num_workers=2)),
    "sharded stream": Kind(lambda: DataLoader(Stream(sharded=True), 4)),
    "sharded sized stream": Kind(lambda: DataLoader(Stream(sharded=True, sized=True), 4)),
    "uneven stream": Kind(lambda: DataLoader(Stream(sharded=True, more_on_first=8), 4)),
    "stateful": Kind(lambda: Stateful(Ids(), 4, sampler=Shuffled(48, mine=True))),
    "stateful stream": Kind(lambda: Stateful(Stream(), 4)),
    "dict": Kind(lambda: {"a": DataLoader(Ids(), 4), "b": DataLoader(Ids(48, 100), 4)}, ids=A + list(range(100, 148))),
    "nested": Kind(lambda: [Subclass(Ids(), 4), (DataLoader(Ids(32, 100), 4, shuffle=True),)], ids=[]),
    "min_size": Kind(lambda: two("min_size"), ids=[]),
    "max_size": Kind(lambda: two("max_size"), ids=A + B),
    "max_size_cycle": Kind(lambda: two("max_size_cycle"), ids=[]),
    "beside a stream": Kind(lambda: {"a": DataLoader(Ids(), 4, shuffle=True), "b": DataLoader(Stream(), 4)}, ids=A + A),
}


class Data(LightningDataModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        return KINDS[self.kind].make()


def ids_of(batch: Any) -> list[int]:
    """Every id in a batch of any collection."""
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return list(itertools.chain.from_iterable(map(ids_of, batch)))
    return [] if batch is None else [int(one) for one in torch.as_tensor(batch).flatten()]
