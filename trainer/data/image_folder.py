"""Pictures in a folder a class, decoded by Pillow."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy
import torch

from trainer.data.class_folders import ClassFolders, Read
from trainer.errors import EnvironmentFault

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
"""Of ImageNet's pixels in 0..1: what published weights expect, and near enough for other photographs."""


class ImageFolder(ClassFolders):
    """Batches of (n, 3, size, size) float32 and (n,) int64 from `root/CLASS/*.jpg` and the like."""

    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm")

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        num_workers: int = 2,
        size: int = 64,
        augment: bool = True,
        held_out: float = 0.1,
        max_bad: int = 100,
    ) -> None:
        """`size`: pixels of a side. `augment`: random crops and mirroring. `max_bad`: unreadable files a process."""
        super().__init__(root, batch_size, num_workers, held_out, max_bad)
        self.size, self.augment = size, augment

    def shape(self) -> list[int]:
        return [3, self.size, self.size]

    def reader(self, training: bool) -> tuple[Read, bool]:
        random = training and self.augment
        return partial(read_image, size=self.size, random=random), random

    def setup(self, stage: str | None = None) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault("data=image_folder needs Pillow", "pip install 'trainer[images]'") from error
        super().setup(stage)


def read_image(path: Path, size: int, random: bool) -> torch.Tensor:
    """The picture with its shorter side scaled to `size` and its middle cut out: (3, size, size), normalised.

    `random`: scaled an eighth larger, cut out anywhere, half of them mirrored. Raises OSError or ValueError.
    """
    from PIL import Image

    with Image.open(path) as file:
        # JPEG decodes at the smallest of 1/1, 1/2, 1/4, 1/8 that is large enough: four times as fast.
        file.draft("RGB", (2 * size, 2 * size))
        picture = file.convert("RGB")
    shorter = size * 9 // 8 if random else size
    scale = shorter / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    if random:
        left, top = (int(torch.randint(room + 1, ())) for room in (width - size, height - size))
    pixels = numpy.asarray(picture)[top : top + size, left : left + size].transpose(2, 0, 1).astype(numpy.float32)
    image = (torch.from_numpy(pixels) / 255 - MEAN) / DEVIATION
    return image.flip(2) if random and torch.rand(()) < 0.5 else image
