"""More data as strangers write them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset

from tests.oracle.data import Data, Rows, _place
from tests.oracle.habits import Sample

Named = namedtuple("Named", "x y")


@dataclass
class Fields:
    x: Tensor
    y: Tensor


class _Collated(Data):
    kind: Any = None

    def _collate(self, samples: list[Any]) -> Any:
        x, y = zip(*samples, strict=True)
        return self.kind(torch.stack(x), torch.stack(y))

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(48, 1), batch_size=self.batch, collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(16, 2), batch_size=self.batch, collate_fn=self._collate)


class NamedTuples(_Collated):
    kind = Named


class DataclassBatches(_Collated):
    kind = Fields


class SampleBatches(_Collated):
    kind = Sample


class NestedRows(Rows):
    def __getitem__(self, index: int) -> Any:
        return {"inputs": [self.x[index]], "meta": {"y": self.y[index], "names": f"row{index}"}}


class NestedBatches(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(NestedRows(48, 1), batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(NestedRows(16, 2), batch_size=8)


class Joined(Data):
    """Subsets of subsets, joined, and tensors."""

    def train_dataloader(self) -> Any:
        rows = Rows(64, 1)
        tensors = TensorDataset(rows.x[:16], rows.y[:16])
        return DataLoader(ConcatDataset([Subset(Subset(rows, range(8, 64)), range(32)), tensors]), batch_size=8)


class PlainLists(Data):
    """A list of samples is a dataset, too."""

    def train_dataloader(self) -> Any:
        rows = Rows(48, 1)
        return DataLoader([rows[index] for index in range(48)], batch_size=8)  # type: ignore[arg-type]


class Fetches(Rows):
    """Reads a whole batch at once by `__getitems__`."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(self.x[index] * 2, self.y[index]) for index in indices]


class FetchesData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Fetches(48, 1), batch_size=8)


class ByKey(Dataset[Any]):
    """Samples under names."""

    def __init__(self) -> None:
        rows = Rows(48, 1)
        self.rows = {f"key{index}": rows[index] for index in range(48)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: str) -> Any:
        return self.rows[key]


class Keys(Sampler[str]):
    def __init__(self, rows: ByKey) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.rows)


class KeysData(Data):
    def train_dataloader(self) -> Any:
        rows = ByKey()
        return DataLoader(rows, batch_size=8, sampler=Keys(rows))  # type: ignore[arg-type]


class DropLast(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(44, 1), batch_size=8, drop_last=True)


class Spawned(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(
            Rows(48, 1), batch_size=8, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
        )


class Endless(IterableDataset[Any]):
    """Never ends; each rank has its own part."""

    def __init__(self) -> None:
        self.rows = Rows(40, 1)

    def __iter__(self) -> Iterator[Any]:
        rank, count = _place()
        index = rank
        while True:
            yield self.rows[index % 40]
            index += count


class EndlessData(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Endless(), batch_size=8)


class NothingForSomeBatches(Data):
    """The collate function gives None where every sample of a batch was broken."""

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(48, 1), batch_size=8, collate_fn=_or_none)


def _or_none(samples: list[Any]) -> Any:
    x, y = zip(*samples, strict=True)
    return None if float(x[0][0]) < -1.0 else [torch.stack(x), torch.stack(y)]


class _Modes(Data):
    mode = "max_size"

    def train_dataloader(self) -> Any:
        both = {"a": DataLoader(Rows(48, 1), batch_size=8), "b": DataLoader(Rows(32, 9), batch_size=8)}
        return CombinedLoader(both, mode=self.mode)  # type: ignore[arg-type]


class CycledLoaders(_Modes):
    mode = "max_size_cycle"


class LongestLoaders(_Modes):
    mode = "max_size"


class NestedLoaders(Data):
    def train_dataloader(self) -> Any:
        return {"a": DataLoader(Rows(48, 1), batch_size=8), "b": [DataLoader(Rows(48, 9), batch_size=8)]}


class SequentialValidations(Data):
    def val_dataloader(self) -> Any:
        loaders = [DataLoader(Rows(16, 2), batch_size=8), DataLoader(Rows(32, 4), batch_size=8)]
        return CombinedLoader(loaders, mode="sequential")


class PairedValidations(Data):
    def val_dataloader(self) -> Any:
        both = {"a": DataLoader(Rows(16, 2), batch_size=8), "b": DataLoader(Rows(32, 4), batch_size=8)}
        return CombinedLoader(both, mode="min_size")


class MuchValidation(Data):
    """Validation data of which the beginning is not like the rest."""

    def val_dataloader(self) -> Any:
        rows = Rows(64, 2)
        rows.x *= torch.arange(64)[:, None]
        return DataLoader(rows, batch_size=8)


class NamedValidations(Data):
    def val_dataloader(self) -> Any:
        return {"near": DataLoader(Rows(16, 2), batch_size=8), "far": DataLoader(Rows(32, 4), batch_size=8)}


class EmptyValidations(Data):
    def val_dataloader(self) -> Any:
        return []


class CountsEpochs(Rows):
    """The samples change by epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        return self.x[index] * (1 + self.epoch), self.y[index]


class SetsEpochs(Data):
    """The data module counts the epochs by the trainer, whose loaders are made anew."""

    def train_dataloader(self) -> Any:
        rows = CountsEpochs(48, 1)
        rows.set_epoch(self.trainer.current_epoch if self.trainer else 0)
        return DataLoader(rows, batch_size=8)


class SharedEpochs(Data):
    """A hook of the module or a callback tells the dataset its epoch."""

    def setup(self, stage: str) -> None:
        self.rows = CountsEpochs(48, 1)

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=8)


class PreparedOnce(Data):
    """`prepare_data` writes, `setup` reads; both are counted."""

    prepared = 0

    def __init__(self) -> None:
        super().__init__()
        self.set_up: list[str] = []

    def setup(self, stage: str) -> None:
        self.set_up.append(stage)

    def train_dataloader(self) -> Any:
        assert self.set_up.count("fit") == 1, self.set_up
        return super().train_dataloader()


class KeepsState(Data):
    """State of the data in the checkpoint."""

    served = 0

    def train_dataloader(self) -> Any:
        self.served += 1
        return super().train_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.served = state_dict["served"]


class Generated(Data):
    """A loader that is an object with `__iter__` alone, made of a generator function."""

    def train_dataloader(self) -> Any:
        return _Generated()


class _Generated:
    def __iter__(self) -> Iterator[Any]:
        batches = DataLoader(Rows(48, 1), batch_size=8)
        rank, count = _place()
        yield from list(batches)[rank::count]


class TransfersItself(Data):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [part.to(device) + (0.25 if part.is_floating_point() else 0) for part in batch]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]


class Weighted(Data):
    """Weights of which one is not zero: a random sampler whose answer is known."""

    def train_dataloader(self) -> Any:
        weights = [0.0] * 48
        weights[5] = 1.0
        sampler = torch.utils.data.WeightedRandomSampler(weights, 48)
        return DataLoader(Rows(48, 1), batch_size=8, sampler=sampler)


class FewOfMany(Data):
    """A subset by a random sampler of one sample."""

    def train_dataloader(self) -> Any:
        sampler = torch.utils.data.SubsetRandomSampler([7] * 40)
        return DataLoader(Rows(48, 1), batch_size=8, sampler=sampler)
