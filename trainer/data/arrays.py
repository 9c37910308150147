"""Datasets that fit in memory as tensors: one gather per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

Transform = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Maps (batch of inputs, their sample ids, epoch) to the batch that the model gets."""

EVALUATION_BATCH = 256
"""Samples per evaluation batch on a rank. Without gradients, small inputs do not need a smaller batch."""


class Arrays(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A dataset of `(samples, ...)` inputs and `(samples,)` targets in memory.

    It supports `gather`, see `seeded.SupportsGather`.

    Args:
        inputs: Tensor of shape `(samples, ...)`.
        targets: Tensor of shape `(samples,)`.
        transform: Applied to the inputs of each batch; None: no transform.
    """

    random = False

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, transform: Transform | None = None) -> None:
        self.inputs, self.targets, self.transform = inputs, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.gather(torch.tensor([index]), 0)
        return inputs[0], targets[0]

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch of the `(batch,)` sample ids: `(batch, ...)` inputs and `(batch,)` targets."""
        inputs = self.inputs.index_select(0, indices)
        if self.transform is not None:
            inputs = self.transform(inputs, indices, epoch)
        return inputs, self.targets.index_select(0, indices)


class ArrayDataModule(LightningDataModule):
    """Base class of data modules whose splits are map-style datasets.

    Subclasses set `train`, `val` and `test` in `setup`.

    Args:
        batch_size: Batch size of the loaders when used outside the trainer. The trainer brings its own sampler.
    """

    default_task: str
    """Import path of the task that is used when the config names none."""
    provides: ClassVar[Any] = None
    """The facts that `facts()` returns, as a literal dict that the config check reads from the source text.

    Values are numbers, names of arguments, `(argument, value if true, value if false)`, lists of these, or None where
    only the files determine them.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.evaluation_batch = EVALUATION_BATCH
        self.train: Dataset[Any] | None = None
        self.val: Dataset[Any] | None = None
        self.test: Dataset[Any] | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the training split, shuffled."""
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the validation split."""
        return self._loader(self.val, self.evaluation_batch)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test split."""
        return self._loader(self.test, self.evaluation_batch)

    def _loader(self, dataset: Dataset[Any] | None, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        assert dataset is not None, "call setup() first"
        pinned = torch.cuda.is_available()
        return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=shuffle, pin_memory=pinned)


def stratified_split(labels: numpy.ndarray, fractions: list[float], seed: int) -> list[numpy.ndarray]:
    """Split sample ids into disjoint sorted parts in which every class has the same proportion.

    Args:
        labels: Array of shape `(samples,)`.
        fractions: Fraction of each part but the last, which takes the remaining samples.
        seed: Seed of the split. It is not the run's seed: a run must not choose its own test set.

    Returns:
        The ids of each part.
    """
    generator = numpy.random.default_rng(seed)
    parts: list[list[numpy.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for label in numpy.unique(labels):
        ids = generator.permutation(numpy.flatnonzero(labels == label))
        cuts = numpy.round(numpy.cumsum(fractions) * len(ids)).astype(int)
        for part, chunk in zip(parts, numpy.split(ids, cuts), strict=True):
            part.append(chunk)
    return [numpy.sort(numpy.concatenate(part)) for part in parts]
