"""Images in one folder per class, decoded by Pillow."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy
import torch

from trainer.core.errors import EnvironmentFault
from trainer.core.install import pip_install
from trainer.data.class_folders import ClassFolders, Reader
from trainer.data.images import MAX_PIXELS, decode

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
"""Mean and standard deviation of ImageNet's pixels in 0..1, shape `(3, 1, 1)`.

Published weights expect these, and they are close enough for other photographs.
"""

GREY_MEAN, GREY_DEVIATION = 0.45, 0.25
"""Approximately the same for one channel."""


class ImageFolder(ClassFolders):
    """Images in `root/CLASS/*.jpg` (also png, webp, bmp, gif, ppm).

    Batches: `(batch, 3, size, size)` float32, with `grey` `(batch, 1, size, size)`, and `(batch,)` int64 classes.

    Args:
        root: Folder with one folder per class, or with `train`, `val` and `test` folders that hold these.
        batch_size: Global batch size.
        num_workers: Worker processes per rank that decode images.
        size: Height and width of an image in pixels.
        augment: Random crops, and horizontal flips with `mirror`.
        held_out: Fraction of the files for each of validation and test, if no folder gives them.
        max_bad: Unreadable files per process that are tolerated.
        grey: Read greyscale images.
        mirror: Random horizontal flips with `augment`: right for photographs, wrong for characters.
        max_pixels: Pixels above which an image counts as unreadable.
    """

    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm")

    provides: ClassVar[dict[str, Any]] = {"input_shape": [("grey", 1, 3), "size", "size"], "num_classes": None}

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        *,
        num_workers: int = 2,
        size: int = 64,
        augment: bool = True,
        held_out: float = 0.1,
        max_bad: int = 100,
        grey: bool = False,
        mirror: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(root, batch_size, num_workers=num_workers, held_out=held_out, max_bad=max_bad)
        self.size, self.augment, self.grey, self.mirror = size, augment, grey, mirror
        self.max_pixels = max_pixels

    def shape(self) -> list[int]:
        """Return the shape of a sample: `[channels, size, size]`."""
        return [1 if self.grey else 3, self.size, self.size]

    def reader(self, training: bool) -> tuple[Reader, bool]:
        """Return the function that reads a file, and whether it is random."""
        random = training and self.augment
        return partial(read_image, random=random, **self._reading()), random

    def _reading(self) -> dict[str, Any]:
        """Return the arguments of `read_image` that every split has."""
        return {"size": self.size, "grey": self.grey, "mirror": self.mirror, "max_pixels": self.max_pixels}

    def setup(self, stage: str | None = None) -> None:
        """Find the files and build the dataset of each split, once.

        Raises:
            EnvironmentFault: Pillow is not installed.
        """
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault("images need Pillow", pip_install("images")) from error
        super().setup(stage)


def read_image(
    path: Path | BinaryIO,
    size: int,
    *,
    random: bool,
    grey: bool = False,
    mirror: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """Read an image, scale its shorter side to `size`, take the centre crop and normalise it.

    With `random`, the shorter side is scaled to 9/8 of `size` before a random crop; with `mirror`, half of the images
    are flipped. An image that is no larger than `size` is not scaled for that (at 8x8 it would blur): it is shifted by
    up to an eighth, with its edge pixels repeated.

    Args:
        path: A path or a binary file object.
        size: Height and width in pixels.
        random: Whether to augment.
        grey: Convert to one channel instead of three.
        mirror: Whether to flip half of the images when `random`.
        max_pixels: Maximum pixels, of the image in the file and once scaled.

    Returns:
        Tensor of shape `(3, size, size)`, with `grey` `(1, size, size)`, float32.

    Raises:
        OSError: The image cannot be read.
        ValueError: The image is damaged, or too large.
    """
    from PIL import Image

    image = decode(path, "L" if grey else "RGB", 2 * size, max_pixels)
    small = min(image.size) <= size
    shorter = size * 9 // 8 if random and not small else size
    scale = shorter / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > max(max_pixels, image.width * image.height):
        raise ValueError(f"{image.width} x {image.height} pixels are {width} x {height} at the size of a sample")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    array: numpy.ndarray = numpy.asarray(image).reshape(height, width, -1)
    if random and small:
        array = numpy.pad(array, ((size // 8,) * 2, (size // 8,) * 2, (0, 0)), mode="edge")
    spare = array.shape[0] - size, array.shape[1] - size
    top, left = (int(torch.randint(room + 1, ())) for room in spare) if random else (room // 2 for room in spare)
    crop = array[top : top + size, left : left + size]
    pixels = torch.from_numpy(crop.transpose(2, 0, 1).astype(numpy.float32)) / 255
    normalised = (pixels - GREY_MEAN) / GREY_DEVIATION if grey else (pixels - MEAN) / DEVIATION
    return normalised.flip(2) if random and mirror and torch.rand(()) < 0.5 else normalised
