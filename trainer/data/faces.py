"""100 faces and 100 images without a face, 25x25 greyscale: scikit-image's `lfw_subset`.

Cut from Labeled Faces in the Wild (Huang et al. 2007). It ships in the wheel, which is not imported.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.core.errors import UserError
from trainer.core.install import pip_install
from trainer.data.arrays import ArrayDataModule, Arrays, stratified_split
from trainer.data.augment import CropAndFlip

SPLIT_SEED = 0
FACES = 100
"""The first 100 images show a face; the others do not."""
MEAN, DEVIATION = 0.377, 0.273
"""Mean and standard deviation of the pixels in 0..1."""


class Faces(ArrayDataModule):
    """Images with and without a face; 60 / 20 / 20 % train / val / test, always the same split.

    Batches: `(batch, 1, 25, 25)` float32 and `(batch,)` int64 classes, 1 for a face.

    Args:
        batch_size: Global batch size.
        augment: Random crops and horizontal flips.
        seed: Seed of the augmentation.
    """

    default_task = "trainer.tasks.classification.Classification"
    provides: ClassVar[dict[str, Any]] = {"input_shape": [1, 25, 25], "num_classes": 2}

    def __init__(self, batch_size: int = 24, augment: bool = True, seed: int = 0) -> None:
        super().__init__(batch_size)
        self.augment, self.seed = augment, seed

    def setup(self, stage: str | None = None) -> None:
        """Read the images and build the dataset of each split, once."""
        if self.train is not None:
            return
        images = numpy.load(_file()).astype(numpy.float32)
        inputs = torch.from_numpy((images - MEAN) / DEVIATION).unsqueeze(1)
        targets = (torch.arange(len(inputs)) < FACES).long()
        train, val, test = (torch.from_numpy(ids) for ids in stratified_split(targets.numpy(), [0.6, 0.2], SPLIT_SEED))
        augmentation = CropAndFlip(self.seed, padding=2) if self.augment else None
        self.train = Arrays(inputs[train], targets[train], augmentation)
        self.val, self.test = (Arrays(inputs[ids], targets[ids]) for ids in (val, test))

    def facts(self) -> dict[str, Any]:
        """Return `input_shape` and `num_classes`."""
        return dict(self.provides)


def _file() -> Path:
    skimage = find_spec("skimage")
    if skimage is None or skimage.origin is None:
        raise UserError("data=faces needs scikit-image, which ships the images", pip_install("faces"))
    return Path(skimage.origin).parent / "data" / "lfw_subset.npy"
