"""Strips of three to six real scans of digits side by side, and what they say: pictures to sequences and back.

The scans are those of `trainer.data.digits`, split as there, so that held-out strips hold scans never seen. Every
epoch draws new strips: a strip is a function of seed, epoch and its number.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule, Arrays
from trainer.data.digits import Digits
from trainer.data.randomness import uniform

START, END, PAD = 10, 11, 12
"""Tokens beyond the digits."""
VOCABULARY = 13
SHORTEST, LONGEST = 3, 6
SIDE = 8
IGNORED = -100
TASKS = {
    "read": "trainer.tasks.image_to_sequence.ImageToSequence",
    "draw": "trainer.tasks.sequence_to_image.SequenceToImage",
}


class Strips(Dataset[tuple[torch.Tensor, ...]]):
    """`read`: (n, 1, 8, 48) pictures, (n, 7) tokens from START on, and the (n, 7) tokens that follow them, IGNORED
    behind END. `draw`: (n, 6) tokens, PAD behind the last, and (n, 1, 8, 48) pictures. See `loader.Gathers`."""

    random = False

    def __init__(self, scans: Arrays, count: int, seed: int, direction: str) -> None:
        self.scans, self.count, self.seed, self.direction = scans, count, seed, direction

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.gather(torch.tensor([index]), 0))

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:
        """The batch of these (n,) ids."""
        draws = uniform(self.seed, epoch, indices, 1 + LONGEST)
        lengths = SHORTEST + (draws[:, :1] * (LONGEST - SHORTEST + 1)).long()
        chosen = (draws[:, 1:] * len(self.scans)).long()
        shown = torch.arange(LONGEST) < lengths
        pictures = self.scans.inputs[chosen] * shown[:, :, None, None, None]
        pictures = pictures.permute(0, 2, 3, 1, 4).reshape(len(indices), 1, SIDE, SIDE * LONGEST)
        digits = torch.where(shown, self.scans.targets[chosen], PAD)
        if self.direction == "draw":
            return digits, pictures
        first, last = torch.full((len(indices), 1), START), torch.full((len(indices), 1), PAD)
        place = torch.arange(LONGEST + 1)
        following = torch.where(place == lengths, END, torch.cat((digits, last), 1))
        return pictures, torch.cat((first, digits), 1), torch.where(place > lengths, IGNORED, following)


class DigitStrips(ArrayDataModule):
    """10,000 strips an epoch; 1,000 each of val and test, always the same."""

    default_tasks = TASKS
    """By `direction`."""
    provides: ClassVar[dict[str, Any]] = {
        "input_shape": [1, 8, 48],
        "output_shape": [1, 8, 48],
        "vocab_size": None,
        "sequence_length": None,
    }

    def __init__(
        self, batch_size: int = 64, direction: str = "read", train_samples: int = 10_000, seed: int = 0
    ) -> None:
        """`direction`: read (picture to digits) or draw (digits to picture). `seed`: of the training strips."""
        super().__init__(batch_size)
        if direction not in TASKS:
            raise UserError(f"data.direction={direction} is not known", f"use {' or '.join(TASKS)}")
        self.direction, self.train_samples, self.seed = direction, train_samples, seed
        self.default_task = self.default_tasks[direction]

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        scans = Digits()
        scans.setup()
        counts = {"train": (self.train_samples, self.seed), "val": (1000, 1), "test": (1000, 2)}
        for split, (count, seed) in counts.items():
            setattr(self, split, Strips(getattr(scans, split), count, seed, self.direction))

    def facts(self) -> dict[str, Any]:
        shape = [1, SIDE, SIDE * LONGEST]
        length = LONGEST + 1 if self.direction == "read" else LONGEST
        return {"input_shape": shape, "output_shape": shape, "vocab_size": VOCABULARY, "sequence_length": length}
