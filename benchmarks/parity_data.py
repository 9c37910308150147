"""What all the variants of `benchmarks/parity` share: models and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from parity_turns import Blocks, Pace
from torch import Tensor

from trainer.config.instantiate import read_plain
from trainer.runtime.process import Rank

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and the size of its work."""

    model: dict[str, Any]
    task: str
    batch_size: int
    """Samples a rank and step."""
    target: float
    """The most that ours may cost, in CPU time of the bare loop."""
    blocks: dict[int, Blocks]
    """By the number of ranks."""
    rounds: int
    log_every: int
    """Steps; a block measures a multiple of it, so that each contains as many logged steps."""


CONF = Path(__file__).resolve().parent.parent / "conf" / "model"


def model_of(option: str, **filled: Any) -> dict[str, Any]:
    """A model of `conf/model`, with what its data would have filled in."""
    return {**read_plain(CONF / f"{option}.yaml"), **filled}


CLASSIFICATION = "trainer.tasks.classification.Classification"
LANGUAGE_MODELLING = "trainer.tasks.language_modelling.LanguageModelling"

CASES = {
    "mlp": Case(
        model=model_of("mlp", input_shape=[784], num_classes=10, hidden=[128], dropout=0.0, norm=None),
        task=CLASSIFICATION,
        batch_size=32,
        target=1.10,
        blocks={1: Blocks(40, settle=5, measured=40), 2: Blocks(28, settle=5, measured=40)},
        rounds=3,
        log_every=10,
    ),
    "resnet": Case(
        model=model_of("resnet_small", input_shape=[1, 28, 28], num_classes=10),
        task=CLASSIFICATION,
        batch_size=16,
        target=1.01,
        blocks={1: Blocks(16, settle=1, measured=10), 2: Blocks(16, settle=1, measured=10)},
        rounds=10,
        log_every=10,
    ),
    "transformer": Case(
        model=model_of("transformer", vocab_size=256, sequence_length=64),
        task=LANGUAGE_MODELLING,
        batch_size=4,
        target=1.01,
        blocks={1: Blocks(8, settle=1, measured=5), 2: Blocks(8, settle=1, measured=5)},
        rounds=6,
        log_every=5,
    ),
}


def batches_of(name: str, rank: int, count: int = 16) -> list[Batch]:
    """The same for every variant; another part of the global batch on each rank."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(1000 + rank)
    found = []
    for _ in range(count):
        if name == "transformer":
            tokens = torch.randint(0, 256, (case.batch_size, 65), generator=generator)
            found.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
        else:
            inputs = torch.randn(case.batch_size, *case.model["input_shape"], generator=generator)
            found.append((inputs, torch.randint(0, 10, (case.batch_size,), generator=generator)))
    return found


class Stream:
    """An epoch of batches held in memory, so that reading data is no part of what is compared."""

    random = False
    """As our own data modules say it: no random number is drawn for a batch (`trainer.data.stream`)."""

    def __init__(self, batches: list[Batch], pace: Pace, steps: int) -> None:
        self.batches = batches
        self.pace = pace
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.steps):
            self.pace.at_fetch(number)
            yield self.batches[number % len(self.batches)]


class Batches(LightningDataModule):
    """The stream as the data module of a run."""

    pace: Pace
    """Set by the variant: a configuration can only name plain values."""

    def __init__(self, case: str, steps: int) -> None:
        super().__init__()
        self.stream = Stream(batches_of(case, Rank.from_environment().rank), self.pace, steps)

    def train_dataloader(self) -> Stream:
        return self.stream
