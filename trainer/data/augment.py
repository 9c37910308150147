"""Augmentation of whole batches of images, the same for a sample at any world size and after a resume."""

from __future__ import annotations

import torch
from torch.nn import functional

from trainer.data.randomness import uniform


class CropAndFlip:
    """Zero-pad by `padding` pixels, cut the old size out at a random place, mirror half of the images."""

    def __init__(self, seed: int, padding: int, flip: bool = True) -> None:
        self.seed, self.padding, self.flip = seed, padding, flip

    def __call__(self, images: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        """(n, channels, height, width) of any dtype, and the (n,) sample ids."""
        number, _, height, width = images.shape
        draws = uniform(self.seed, epoch, indices, 3)
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        columns = torch.arange(width).expand(number, width)
        if self.flip:
            columns = torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
        rows = (top[:, None] + torch.arange(height))[:, :, None]
        columns = (left[:, None] + columns)[:, None, :]
        padded = functional.pad(images, [self.padding] * 4).permute(0, 2, 3, 1)
        return padded[torch.arange(number)[:, None, None], rows, columns].permute(0, 3, 1, 2).contiguous()


class Normalize:
    """uint8 pixels to float32 with the given mean and deviation, both of pixels in 0..1."""

    def __init__(self, mean: float, deviation: float) -> None:
        self.scale, self.shift = 1 / (255 * deviation), -mean / deviation

    def __call__(self, images: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        return images.float().mul_(self.scale).add_(self.shift)
