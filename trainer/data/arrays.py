"""Data that fits in memory as tensors: one gather a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

Transform = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(batch of inputs, their sample ids, epoch) to the batch that the model gets."""

EVALUATION_BATCH = 256
"""Samples of an evaluation batch on a rank: without gradients, small inputs need no smaller one."""


class Arrays(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """(n, ...) inputs and (n,) targets; see `loader.Gathers`."""

    random = False

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, transform: Transform | None = None) -> None:
        self.inputs, self.targets, self.transform = inputs, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.gather(torch.tensor([index]), 0)
        return inputs[0], targets[0]

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of these (n,) ids."""
        inputs = self.inputs.index_select(0, indices)
        if self.transform is not None:
            inputs = self.transform(inputs, indices, epoch)
        return inputs, self.targets.index_select(0, indices)


class ArrayDataModule(LightningDataModule):
    """Base of the modules whose splits are map-style datasets; a subclass sets the three in `setup`."""

    default_task: str
    provides: ClassVar[Any] = None
    """The names of `facts()`, read as source text at the prompt: a literal dict to their values, which are numbers,
    names of arguments, (argument, value if true, value if not), lists of these, or None where only the files tell."""

    def __init__(self, batch_size: int) -> None:
        """`batch_size`: of the loaders as they are outside of the trainer, which brings its own order."""
        super().__init__()
        self.batch_size = batch_size
        self.evaluation_batch = EVALUATION_BATCH
        self.train: Dataset[Any] | None = None
        self.val: Dataset[Any] | None = None
        self.test: Dataset[Any] | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val, self.evaluation_batch)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test, self.evaluation_batch)

    def _loader(self, dataset: Dataset[Any] | None, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        assert dataset is not None, "setup() comes first"
        pinned = torch.cuda.is_available()
        return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=shuffle, pin_memory=pinned)


def stratified_split(labels: numpy.ndarray, fractions: list[float], seed: int) -> list[numpy.ndarray]:
    """Sorted ids of each part, disjoint, with every class in the same proportions; the last takes the rest.

    `fractions` are of all but the last part. `seed` is not the run's: a run must not choose its own test set.
    """
    generator = numpy.random.default_rng(seed)
    parts: list[list[numpy.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for label in numpy.unique(labels):
        ids = generator.permutation(numpy.flatnonzero(labels == label))
        cuts = numpy.round(numpy.cumsum(fractions) * len(ids)).astype(int)
        for part, chunk in zip(parts, numpy.split(ids, cuts), strict=True):
            part.append(chunk)
    return [numpy.sort(numpy.concatenate(part)) for part in parts]
