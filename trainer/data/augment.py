"""Augmentation of whole batches of images, the same for a sample at any world size and after a resume."""

from __future__ import annotations

import torch
from torch.nn import functional

from trainer.data.randomness import uniform


class CropAndFlip:
    """Random crop after zero padding, and random horizontal flip of half of the images.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2 (CIFAR-10, padding 4).

    Args:
        seed: Seed of the augmentation.
        padding: Pixels added to each side before the crop to the original size.
        flip: Whether to flip half of the images.
    """

    def __init__(self, seed: int, padding: int, flip: bool = True) -> None:
        self.seed, self.padding, self.flip = seed, padding, flip

    def __call__(self, images: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return augmented images of shape `(batch, channels, height, width)` and the dtype of the input.

        Args:
            images: Images of the same shape, of any dtype.
            indices: Sample ids of shape `(batch,)`.
            epoch: The epoch; each one draws new crops.
        """
        batch, _, height, width = images.shape
        draws = uniform(self.seed, epoch, indices, 3)
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        columns = torch.arange(width).expand(batch, width)
        if self.flip:
            columns = torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
        rows = (top[:, None] + torch.arange(height))[:, :, None]
        columns = (left[:, None] + columns)[:, None, :]
        padded = functional.pad(images, [self.padding] * 4).permute(0, 2, 3, 1)
        return padded[torch.arange(batch)[:, None, None], rows, columns].permute(0, 3, 1, 2).contiguous()


class Normalize:
    """Convert uint8 pixels to normalised float32.

    Args:
        mean: Mean of the pixels scaled to 0..1.
        deviation: Standard deviation of the pixels scaled to 0..1.
    """

    def __init__(self, mean: float, deviation: float) -> None:
        self.scale, self.shift = 1 / (255 * deviation), -mean / deviation

    def __call__(self, images: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        """Normalise images of any shape; the sample ids and the epoch are ignored."""
        return images.float().mul_(self.scale).add_(self.shift)
