"""Emoji and their Unicode names: pictures to sequences of letters and back, of names never seen in training.

Drawn by Pillow from Noto Color Emoji (Debian's fonts-noto-color-emoji; OFL 1.1) at the only size that it has.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.core.errors import UserError
from trainer.data import locations
from trainer.data.arrays import ArrayDataModule, Arrays
from trainer.data.augment import CropAndFlip
from trainer.data.files import split_by_name

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -"
START, END, PAD = len(LETTERS), len(LETTERS) + 1, len(LETTERS) + 2
"""Tokens beyond the letters."""
VOCABULARY = len(LETTERS) + 3
LONGEST = 24
"""Letters of a name; the 13 % of longer ones (clock faces, letters in squares) are left out."""
CODES = (range(0x2190, 0x2C00), range(0x1F000, 0x1FB00))
"""Where Unicode has its pictographs."""
DRAWN_AT, DRAWN_SIZE = 109, (136, 128)
"""Pixels of the only size in the font, and of a picture at it."""
HELD_OUT = 0.1
IGNORED = -100
TASKS = {
    "read": "trainer.tasks.image_to_sequence.ImageToSequence",
    "draw": "trainer.tasks.sequence_to_image.SequenceToImage",
}


class Named(Arrays):
    """`read`: (n, 3, side, side) pictures, (n, 25) tokens from START on, and those that follow them, IGNORED behind
    END. `draw`: (n, 24) tokens, PAD behind the last, and the pictures. See `loader.Gathers`."""

    def __init__(self, pictures: torch.Tensor, names: torch.Tensor, direction: str, crop: CropAndFlip | None) -> None:
        super().__init__(pictures, names, crop)
        self.direction = direction

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """The batch of these (n,) ids."""
        pictures, names = super().gather(indices, epoch)
        pictures = pictures.float() / 255
        if self.direction == "draw":
            return names, pictures
        first, last = torch.full((len(names), 1), START), torch.full((len(names), 1), PAD)
        following = torch.cat((names, last), 1)
        ends = (names != PAD).sum(1, keepdim=True)
        place = torch.arange(LONGEST + 1)
        following = torch.where(place == ends, END, following)
        return pictures, torch.cat((first, names), 1), torch.where(place > ends, IGNORED, following)


class Emoji(ArrayDataModule):
    """About 1,200 pictures and names; 80 / 10 / 10 % train / val / test by the name."""

    default_tasks = TASKS
    """By `direction`."""
    provides: ClassVar[dict[str, Any]] = {
        "input_shape": [3, "side", "side"],
        "output_shape": [3, "side", "side"],
        "vocab_size": None,
        "sequence_length": None,
    }

    def __init__(
        self, batch_size: int = 32, direction: str = "read", side: int = 16, font: str | None = None, seed: int = 0
    ) -> None:
        """`direction`: read (picture to name) or draw (name to picture). `side`: pixels. `font`: the file of Noto
        Color Emoji; null: `locations.EMOJI`. `seed`: of the shifts of the pictures that are read in training."""
        super().__init__(batch_size)
        if direction not in TASKS:
            raise UserError(f"data.direction={direction} is not known", f"use {' or '.join(TASKS)}")
        self.direction, self.side, self.font, self.seed = direction, side, font, seed
        self.default_task = self.default_tasks[direction]

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        pictures = drawn(locations.emoji(self.font), self.side)
        parts = split_by_name(list(pictures), str, HELD_OUT)
        crop = CropAndFlip(self.seed, padding=1, flip=False) if self.direction == "read" else None
        for split, names in parts.items():
            stacked = torch.from_numpy(numpy.stack([pictures[name] for name in names]))
            tokens = torch.tensor([encode(name) for name in names])
            setattr(self, split, Named(stacked, tokens, self.direction, crop if split == "train" else None))

    def facts(self) -> dict[str, Any]:
        shape = [3, self.side, self.side]
        length = LONGEST + 1 if self.direction == "read" else LONGEST
        return {"input_shape": shape, "output_shape": shape, "vocab_size": VOCABULARY, "sequence_length": length}


def encode(name: str) -> list[int]:
    """LONGEST tokens."""
    return [LETTERS.index(letter) for letter in name] + [PAD] * (LONGEST - len(name))


def drawn(font: Path, side: int) -> dict[str, numpy.ndarray]:
    """Name to the (3, side, side) uint8 picture on white of all that the font draws and that has a short name."""
    from PIL import Image, ImageDraw, ImageFont

    glyphs = ImageFont.truetype(str(font), DRAWN_AT)
    found = {}
    for code in (code for codes in CODES for code in codes):
        name = unicodedata.name(chr(code), "")
        if not 0 < len(name) <= LONGEST or not set(name) <= set(LETTERS):
            continue
        picture = Image.new("RGB", DRAWN_SIZE, "white")
        ImageDraw.Draw(picture).text((0, 0), chr(code), font=glyphs, embedded_color=True)
        if picture.getextrema() != ((255, 255),) * 3:
            small = picture.resize((side, side), Image.Resampling.BOX)
            found[name] = numpy.asarray(small).transpose(2, 0, 1).copy()
    return found
