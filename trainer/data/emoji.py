"""Emoji and their Unicode names: image to letters and back, tested on names that were never seen in training.

Drawn by Pillow from Noto Color Emoji (Debian's fonts-noto-color-emoji; OFL 1.1), whose bitmaps have one size.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy
import torch

from trainer.core.errors import UserError
from trainer.data import locations
from trainer.data.arrays import ArrayDataModule, Arrays
from trainer.data.augment import CropAndFlip
from trainer.data.files import split_by_name

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -"
START, END, PAD = len(LETTERS), len(LETTERS) + 1, len(LETTERS) + 2
"""Special tokens after the letters. `END` and `PAD` follow."""
VOCABULARY = len(LETTERS) + 3
LONGEST = 24
"""Letters in a name. The 13 % of emoji with longer names (clock faces, squared letters) are left out."""
CODES = (range(0x2190, 0x2C00), range(0x1F000, 0x1FB00))
"""The Unicode ranges that hold pictographs."""
DRAWN_AT, DRAWN_SIZE = 109, (136, 128)
"""Font size of the only bitmaps in the font, and the size of an image at it, in pixels."""
HELD_OUT = 0.1
IGNORED = -100
TASKS = {
    "read": "trainer.tasks.image_to_sequence.ImageToSequence",
    "draw": "trainer.tasks.sequence_to_image.SequenceToImage",
}


class EmojiDataset(Arrays):
    """Emoji and their names; supports `gather`, see `seeded.SupportsGather`.

    Batches of direction `read`: `(batch, 3, side, side)` float32 images in 0..1, `(batch, 25)` int64 input tokens that
    begin with START, and `(batch, 25)` int64 targets, IGNORED after END. Batches of direction `draw`: `(batch, 24)`
    int64 tokens, PAD after the last letter, and the images.

    Args:
        images: Tensor of shape `(samples, 3, side, side)`, uint8.
        names: Tokens of shape `(samples, 24)`.
        direction: `read` or `draw`.
        crop: Augmentation of the images.
    """

    def __init__(self, images: torch.Tensor, names: torch.Tensor, direction: str, crop: CropAndFlip | None) -> None:
        super().__init__(images, names, crop)
        self.direction = direction

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Return the batch of the `(batch,)` sample ids."""
        images, names = super().gather(indices, epoch)
        images = images.float() / 255
        if self.direction == "draw":
            return names, images
        first, last = torch.full((len(names), 1), START), torch.full((len(names), 1), PAD)
        targets = torch.cat((names, last), 1)
        ends = (names != PAD).sum(1, keepdim=True)
        position = torch.arange(LONGEST + 1)
        targets = torch.where(position == ends, END, targets)
        return images, torch.cat((first, names), 1), torch.where(position > ends, IGNORED, targets)


class Emoji(ArrayDataModule):
    """About 1,200 emoji and their names; 80 / 10 / 10 % train / val / test, split by the name.

    The shapes of the batches are those of `EmojiDataset`.

    Args:
        batch_size: Global batch size.
        direction: `read`: image to name; `draw`: name to image.
        side: Height and width of an image in pixels.
        font: The file of Noto Color Emoji; None: `locations.EMOJI`.
        seed: Seed of the random crops, which direction `read` has in training.
    """

    default_tasks = TASKS
    """Task of each `direction`."""
    provides: ClassVar[dict[str, Any]] = {
        "input_shape": [3, "side", "side"],
        "output_shape": [3, "side", "side"],
        "vocab_size": None,
        "sequence_length": None,
    }

    def __init__(
        self,
        batch_size: int = 32,
        direction: Literal["read", "draw"] = "read",
        side: int = 16,
        font: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        if direction not in TASKS:
            raise UserError(f"data.direction={direction}: unknown direction", f"use {' or '.join(TASKS)}")
        self.direction, self.side, self.font, self.seed = direction, side, font, seed
        self.default_task = self.default_tasks[direction]

    def setup(self, stage: str | None = None) -> None:
        """Draw the emoji and build the dataset of each split, once."""
        if self.train is not None:
            return
        images = draw_emoji(locations.emoji(self.font), self.side)
        parts = split_by_name(list(images), str, HELD_OUT)
        crop = CropAndFlip(self.seed, padding=1, flip=False) if self.direction == "read" else None
        for split, names in parts.items():
            stacked = torch.from_numpy(numpy.stack([images[name] for name in names]))
            tokens = torch.tensor([encode(name) for name in names])
            setattr(self, split, EmojiDataset(stacked, tokens, self.direction, crop if split == "train" else None))

    def facts(self) -> dict[str, Any]:
        """Return `input_shape`, `output_shape`, `vocab_size` and `sequence_length`."""
        shape = [3, self.side, self.side]
        length = LONGEST + 1 if self.direction == "read" else LONGEST
        return {"input_shape": shape, "output_shape": shape, "vocab_size": VOCABULARY, "sequence_length": length}


def encode(name: str) -> list[int]:
    """Return the LONGEST tokens of a name."""
    return [LETTERS.index(letter) for letter in name] + [PAD] * (LONGEST - len(name))


def draw_emoji(font: Path, side: int) -> dict[str, numpy.ndarray]:
    """Draw each emoji that the font has and whose name is short enough.

    Returns:
        Name to image of shape `(3, side, side)`, uint8, on a white background.
    """
    from PIL import Image, ImageDraw, ImageFont

    glyphs = ImageFont.truetype(str(font), DRAWN_AT)
    images = {}
    for code in (code for codes in CODES for code in codes):
        name = unicodedata.name(chr(code), "")
        if not 0 < len(name) <= LONGEST or not set(name) <= set(LETTERS):
            continue
        canvas = Image.new("RGB", DRAWN_SIZE, "white")
        ImageDraw.Draw(canvas).text((0, 0), chr(code), font=glyphs, embedded_color=True)
        if canvas.getextrema() != ((255, 255),) * 3:
            small = canvas.resize((side, side), Image.Resampling.BOX)
            images[name] = numpy.asarray(small).transpose(2, 0, 1).copy()
    return images
