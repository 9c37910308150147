"""100 faces and 100 pictures without one, 25x25 grey: scikit-image's `lfw_subset`, cut from Labeled Faces in the Wild
(Huang et al. 2007). It comes inside the wheel, which is not imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule, Arrays, stratified_split
from trainer.data.augment import CropAndFlip

SPLIT_SEED = 0
FACES = 100
"""The first so many pictures; the others have no face."""
MEAN, DEVIATION = 0.377, 0.273
"""Of the pixels, in 0..1."""


class Faces(ArrayDataModule):
    """Batches of (n, 1, 25, 25) float32 and (n,) int64, 1 for a face; 60 / 20 / 20 % train / val / test."""

    default_task = "trainer.tasks.classification.Classification"
    provides: ClassVar[dict[str, Any]] = {"input_shape": [1, 25, 25], "num_classes": 2}

    def __init__(self, batch_size: int = 24, augment: bool = True, seed: int = 0) -> None:
        """`augment`: random crops and mirroring. `seed`: of that."""
        super().__init__(batch_size)
        self.augment, self.seed = augment, seed

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        pictures = numpy.load(_file()).astype(numpy.float32)
        inputs = torch.from_numpy((pictures - MEAN) / DEVIATION).unsqueeze(1)
        targets = (torch.arange(len(inputs)) < FACES).long()
        train, val, test = (torch.from_numpy(ids) for ids in stratified_split(targets.numpy(), [0.6, 0.2], SPLIT_SEED))
        augmentation = CropAndFlip(self.seed, padding=2) if self.augment else None
        self.train = Arrays(inputs[train], targets[train], augmentation)
        self.val, self.test = (Arrays(inputs[ids], targets[ids]) for ids in (val, test))

    def facts(self) -> dict[str, Any]:
        return dict(self.provides)


def _file() -> Path:
    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError("data=faces needs scikit-image, which has the pictures", "pip install 'trainer[faces]'")
    return Path(found.origin).parent / "data" / "lfw_subset.npy"
