"""Pictures in a folder a class, decoded by Pillow."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy
import torch

from trainer.core.errors import EnvironmentFault
from trainer.data.class_folders import ClassFolders, Read

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
"""Of ImageNet's pixels in 0..1: what published weights expect, and near enough for other photographs."""

GREY_MEAN, GREY_DEVIATION = 0.45, 0.25
"""The same for one channel, about."""


class ImageFolder(ClassFolders):
    """Batches of (n, 3, size, size) float32 (with `grey` 1 channel) and (n,) int64 from `root/CLASS/*.jpg` and the
    like."""

    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm")

    provides: ClassVar[dict[str, Any]] = {"input_shape": [("grey", 1, 3), "size", "size"], "num_classes": None}

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        num_workers: int = 2,
        size: int = 64,
        augment: bool = True,
        held_out: float = 0.1,
        max_bad: int = 100,
        grey: bool = False,
        mirror: bool = True,
    ) -> None:
        """`size`: pixels of a side. `augment`: random crops and, with `mirror`, mirroring, which suits photographs
        and not characters. `max_bad`: unreadable files a process.
        """
        super().__init__(root, batch_size, num_workers, held_out, max_bad)
        self.size, self.augment, self.grey, self.mirror = size, augment, grey, mirror

    def shape(self) -> list[int]:
        return [1 if self.grey else 3, self.size, self.size]

    def reader(self, training: bool) -> tuple[Read, bool]:
        random = training and self.augment
        return partial(read_image, size=self.size, random=random, grey=self.grey, mirror=self.mirror), random

    def setup(self, stage: str | None = None) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault("pictures need Pillow", "pip install 'trainer[images]'") from error
        super().setup(stage)


def read_image(path: Path | BinaryIO, size: int, random: bool, grey: bool = False, mirror: bool = True) -> torch.Tensor:
    """The picture with its shorter side scaled to `size` and its middle cut out: (3 or 1, size, size), normalised.

    `random`: scaled an eighth larger, cut out anywhere and, with `mirror`, half of them mirrored. A picture that is
    no larger than `size` is not scaled for that (at 8x8 it would blur) but moved by up to an eighth, its edges
    repeated. Raises OSError or ValueError.
    """
    from PIL import Image

    mode = "L" if grey else "RGB"
    with Image.open(path) as file:
        # JPEG decodes at the smallest of 1/1, 1/2, 1/4, 1/8 that is large enough: four times as fast.
        file.draft(mode, (2 * size, 2 * size))
        picture = file.convert(mode)
    small = min(picture.size) <= size
    shorter = size * 9 // 8 if random and not small else size
    scale = shorter / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    array: numpy.ndarray = numpy.asarray(picture).reshape(height, width, -1)
    if random and small:
        array = numpy.pad(array, ((size // 8,) * 2, (size // 8,) * 2, (0, 0)), mode="edge")
    room = array.shape[0] - size, array.shape[1] - size
    top, left = (int(torch.randint(free + 1, ())) for free in room) if random else (free // 2 for free in room)
    cut = array[top : top + size, left : left + size]
    pixels = torch.from_numpy(cut.transpose(2, 0, 1).astype(numpy.float32)) / 255
    image = (pixels - GREY_MEAN) / GREY_DEVIATION if grey else (pixels - MEAN) / DEVIATION
    return image.flip(2) if random and mirror and torch.rand(()) < 0.5 else image
