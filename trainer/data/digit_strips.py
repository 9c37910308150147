"""Strips of three to six scanned digits side by side, and the digits they show: image to sequence and back.

The scans are those of `trainer.data.digits`, with the same splits, so that held-out strips show scans that were never
seen in training. Every epoch draws new strips: a strip is a function of seed, epoch and index.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import Dataset

from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule, Arrays
from trainer.data.digits import Digits
from trainer.data.randomness import uniform

START, END, PAD = 10, 11, 12
"""Special tokens after the ten digits. `END` and `PAD` follow."""
VOCABULARY = 13
SHORTEST, LONGEST = 3, 6
SIDE = 8
IGNORED = -100
TASKS = {
    "read": "trainer.tasks.image_to_sequence.ImageToSequence",
    "draw": "trainer.tasks.sequence_to_image.SequenceToImage",
}


class Strips(Dataset[tuple[torch.Tensor, ...]]):
    """Random strips of digits, or the digits to draw them from; supports `gather`, see `seeded.SupportsGather`.

    Batches of direction `read`: `(batch, 1, 8, 48)` float32 images in 0..1, `(batch, 7)` int64 input tokens that begin
    with START, and `(batch, 7)` int64 targets, IGNORED after END. Batches of direction `draw`: `(batch, 6)` int64
    tokens, PAD after the last digit, and `(batch, 1, 8, 48)` images.

    Args:
        scans: Images of shape `(scans, 1, 8, 8)` and their digits.
        count: Number of strips.
        seed: Seed of the strips.
        direction: `read` or `draw`.
    """

    random = False

    def __init__(self, scans: Arrays, count: int, seed: int, direction: str) -> None:
        self.scans, self.count, self.seed, self.direction = scans, count, seed, direction

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.gather(torch.tensor([index]), 0))

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:
        """Return the batch of the `(batch,)` sample ids."""
        draws = uniform(self.seed, epoch, indices, 1 + LONGEST)
        lengths = SHORTEST + (draws[:, :1] * (LONGEST - SHORTEST + 1)).long()
        chosen = (draws[:, 1:] * len(self.scans)).long()
        shown = torch.arange(LONGEST) < lengths
        images = self.scans.inputs[chosen] * shown[:, :, None, None, None]
        images = images.permute(0, 2, 3, 1, 4).reshape(len(indices), 1, SIDE, SIDE * LONGEST)
        digits = torch.where(shown, self.scans.targets[chosen], PAD)
        if self.direction == "draw":
            return digits, images
        first, last = torch.full((len(indices), 1), START), torch.full((len(indices), 1), PAD)
        position = torch.arange(LONGEST + 1)
        targets = torch.where(position == lengths, END, torch.cat((digits, last), 1))
        return images, torch.cat((first, digits), 1), torch.where(position > lengths, IGNORED, targets)


class DigitStrips(ArrayDataModule):
    """Strips of digits: 10,000 new ones per epoch; 1,000 each for validation and test, always the same.

    The shapes of the batches are those of `Strips`.

    Args:
        batch_size: Global batch size.
        direction: `read`: image to digits; `draw`: digits to image.
        train_samples: Strips per epoch.
        seed: Seed of the training strips.
    """

    default_tasks = TASKS
    """Task of each `direction`."""
    provides: ClassVar[dict[str, Any]] = {
        "input_shape": [1, 8, 48],
        "output_shape": [1, 8, 48],
        "vocab_size": None,
        "sequence_length": None,
    }

    def __init__(
        self,
        batch_size: int = 64,
        direction: Literal["read", "draw"] = "read",
        train_samples: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        if direction not in TASKS:
            raise UserError(f"data.direction={direction}: unknown direction", f"use {' or '.join(TASKS)}")
        self.direction, self.train_samples, self.seed = direction, train_samples, seed
        self.default_task = self.default_tasks[direction]

    def setup(self, stage: str | None = None) -> None:
        """Build the dataset of each split, once."""
        if self.train is not None:
            return
        scans = Digits()
        scans.setup()
        counts = {"train": (self.train_samples, self.seed), "val": (1000, 1), "test": (1000, 2)}
        for split, (count, seed) in counts.items():
            setattr(self, split, Strips(getattr(scans, split), count, seed, self.direction))

    def facts(self) -> dict[str, Any]:
        """Return `input_shape`, `output_shape`, `vocab_size` and `sequence_length`."""
        shape = [1, SIDE, SIDE * LONGEST]
        length = LONGEST + 1 if self.direction == "read" else LONGEST
        return {"input_shape": shape, "output_shape": shape, "vocab_size": VOCABULARY, "sequence_length": length}
