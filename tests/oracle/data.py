"""Data modules as strangers write them, one for each kind of loader. None shuffles: the order is nobody's secret."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from tests.oracle.modules import CLASSES, WIDTH


class Rows(Dataset[Any]):
    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, WIDTH, generator=generator)
        self.y = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class NamedRows(Rows):
    def __getitem__(self, index: int) -> Any:
        return {"input_ids": self.x[index], "labels": self.y[index]}


class RaggedRows(Rows):
    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.x[index][: 1 + index % 4]


class Data(pl.LightningDataModule):
    """48 rows in batches of 8."""

    width = WIDTH

    def __init__(self, batch: int = 8) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(48, 1), batch_size=self.batch)

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(16, 2), batch_size=self.batch)


class NoValidation(Data):
    val_dataloader = pl.LightningDataModule.val_dataloader


class NamedData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(NamedRows(48, 1), batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(NamedRows(16, 2), batch_size=8)


class RaggedData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(RaggedRows(48, 1), batch_size=8, collate_fn=_listed)

    def val_dataloader(self) -> Any:
        return DataLoader(RaggedRows(16, 2), batch_size=8, collate_fn=_listed)


def _listed(samples: list[Any]) -> Any:
    return tuple(zip(*samples, strict=True))


class Subclass(DataLoader[Any]):
    """As the loaders of torch_geometric and MONAI: an `__init__` of its own, and a collate function."""

    def __init__(self, dataset: Any, batch_size: int = 1, follow: Any = None, **options: Any) -> None:
        self.follow = follow
        options.pop("collate_fn", None)
        super().__init__(dataset, batch_size, collate_fn=_doubled, **options)


def _doubled(samples: list[Any]) -> Any:
    inputs, targets = zip(*samples, strict=True)
    return torch.stack(inputs) * 2, torch.stack(targets)


class SubclassData(Data):
    def train_dataloader(self) -> Any:
        return Subclass(Rows(48, 1), batch_size=8)


class DictData(Data):
    def train_dataloader(self) -> Any:
        return {"a": DataLoader(Rows(48, 1), batch_size=8), "b": DataLoader(Rows(48, 9), batch_size=4)}


class ListData(Data):
    def train_dataloader(self) -> Any:
        return [DataLoader(Rows(48, 1), batch_size=8), DataLoader(Rows(48, 9), batch_size=8)]


class ShortestData(Data):
    def train_dataloader(self) -> Any:
        both = {"a": DataLoader(Rows(48, 1), batch_size=8), "b": DataLoader(Rows(32, 9), batch_size=8)}
        return CombinedLoader(both, mode="min_size")


class ValidationsData(Data):
    def val_dataloader(self) -> Any:
        return [DataLoader(Rows(16, 2), batch_size=8), DataLoader(Rows(32, 4), batch_size=8)]


class Stream(IterableDataset[Any]):
    """Each rank yields its own part."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        rank, count = _place()
        for index in range(rank, len(self.rows), count):
            yield self.rows[index]


def _place() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class StreamData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(Rows(48, 1)), batch_size=8)


class Strided(Sampler[int]):
    """Gives every rank a share of its own, without being torch's DistributedSampler."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank, self.num_replicas = _place()

    def __len__(self) -> int:
        return self.size // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.size, self.num_replicas))


class StridedData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(48, 1), batch_size=8, sampler=Strided(48))


class DistributedData(Data):
    def train_dataloader(self) -> Any:
        rows = Rows(48, 1)
        rank, count = _place()
        return DataLoader(rows, batch_size=8, sampler=DistributedSampler(rows, count, rank, shuffle=False))


class Backwards(Sampler[int]):
    """An order of its own, of all samples."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size - 1, -1, -1))


class BackwardsData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(48, 1), batch_size=8, sampler=Backwards(48))


class Paired(BatchSampler):
    """Puts a sample and its neighbour into the same batch; torch's constructor, an order of its own."""

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield [index ^ 1 for index in batch]


class BatchSamplerData(Data):
    def train_dataloader(self) -> Any:
        rows = Rows(48, 1)
        sampler = torch.utils.data.SequentialSampler(rows)
        return DataLoader(rows, batch_sampler=Paired(sampler, batch_size=8, drop_last=False))


class Batched(Rows):
    """A sample is a batch already."""

    def __len__(self) -> int:
        return len(self.x) // 8

    def __getitem__(self, index: int) -> Any:
        return self.x[index * 8 : index * 8 + 8], self.y[index * 8 : index * 8 + 8]


class UnbatchedData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Batched(48, 1), batch_size=None)


class Listed(Data):
    """A list of batches is a loader, too."""

    def train_dataloader(self) -> Any:
        batches = DataLoader(Rows(48, 1), batch_size=8)
        rank, count = _place()
        return _Sized(list(batches)[rank::count])


class _Sized:
    def __init__(self, batches: list[list[Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(self.batches)


class WorkersData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(48, 1), batch_size=8, num_workers=1, persistent_workers=True)


class TailData(Data):
    """44 rows: the last batch is smaller."""

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(44, 1), batch_size=8)


class SplitInSetup(Data):
    def setup(self, stage: str) -> None:
        if stage == "fit":
            generator = torch.Generator().manual_seed(1)
            self.train, self.held_out = torch.utils.data.random_split(Rows(64, 1), [48, 16], generator)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=8)


class AsksItsTrainer(Data):
    def setup(self, stage: str) -> None:
        self.each = 16 // self.trainer.world_size  # type: ignore[union-attr]

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return DataLoader(Rows(48, 1), batch_size=16 // self.trainer.world_size)


class MovesBatchesItself(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 0.5, batch[1]]
