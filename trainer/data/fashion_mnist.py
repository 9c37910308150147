"""Fashion-MNIST: 60,000 + 10,000 images of garments, 28x28 greyscale, 10 classes (Xiao et al. 2017, MIT licence)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.core.errors import UserError
from trainer.data import locations
from trainer.data.arrays import ArrayDataModule, Arrays, stratified_split
from trainer.data.augment import CropAndFlip, Normalize
from trainer.data.idx import read_idx

SPLIT_SEED = 0
VALIDATION_FRACTION = 1 / 12
MEAN, DEVIATION = 0.2860, 0.3530
"""Mean and standard deviation of the pixels of the training file, in 0..1."""


class FashionMNIST(ArrayDataModule):
    """Fashion-MNIST; 55,000 train, 5,000 val, the official 10,000 test images.

    Batches: `(batch, 1, 28, 28)` float32 and `(batch,)` int64 classes.

    Args:
        batch_size: Global batch size.
        root: Folder of the four IDX files, gzipped or not; None: `locations.FASHION_MNIST`.
        augment: Random crops and horizontal flips.
        crop_padding: Pixels added to each side before a random crop; 0: flips only.
        train_samples: Train on the first `train_samples` images only; None: all.
        seed: Seed of the augmentation.
    """

    default_task = "trainer.tasks.classification.Classification"
    provides: ClassVar[dict[str, Any]] = {"input_shape": [1, 28, 28], "num_classes": 10}

    def __init__(
        self,
        batch_size: int = 128,
        *,
        root: str | None = None,
        augment: bool = False,
        crop_padding: int = 2,
        train_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        self.root, self.augment, self.train_samples, self.seed = root, augment, train_samples, seed
        self.crop_padding = crop_padding

    def setup(self, stage: str | None = None) -> None:
        """Read the files and build the dataset of each split, once."""
        if self.train is not None:
            return
        folder = locations.fashion_mnist(self.root)
        images, labels = (_read(folder, f"train-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        train, val = stratified_split(labels, [1 - VALIDATION_FRACTION], SPLIT_SEED)
        normalize = Normalize(MEAN, DEVIATION)
        crop = CropAndFlip(self.seed, padding=self.crop_padding)

        def augmented(batch: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
            return normalize(crop(batch, indices, epoch), indices, epoch)

        train = train[: self.train_samples]
        self.train = Arrays(*_tensors(images[train], labels[train]), augmented if self.augment else normalize)
        self.val = Arrays(*_tensors(images[val], labels[val]), normalize)
        held_out = (_read(folder, f"t10k-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        self.test = Arrays(*_tensors(*held_out), normalize)

    def facts(self) -> dict[str, Any]:
        """Return `input_shape` and `num_classes`."""
        return dict(self.provides)


def _read(folder: Path, name: str) -> numpy.ndarray:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return read_idx(path)
    raise UserError(f"{folder / name}[.gz] is missing", "set data.root=FOLDER to the folder of all four files")


def _tensors(images: numpy.ndarray, labels: numpy.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()
