"""What all the variants of `benchmarks/parity` share: models, batches, and the clock that is read at each fetch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from trainer.config.build import read_plain
from trainer.worker.process import Rank

Batch = tuple[Tensor, Tensor]

WARM_UP = 5
"""Steps before the clock counts: allocations, the optimizer's state, DDP's buckets."""
LOG_EVERY = 10


@dataclass(frozen=True)
class Case:
    """A model and the size of its work."""

    model: dict[str, Any]
    task: str
    batch_size: int
    """Samples a rank and step."""
    target: float
    """The most that ours may cost, in CPU time of the bare loop."""
    steps: int
    rounds: int


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
        target=1.25,
        steps=400,
        rounds=11,
    ),
    "resnet": Case(
        model=model_of("resnet_small", input_shape=[1, 28, 28], num_classes=10),
        task=CLASSIFICATION,
        batch_size=16,
        target=1.02,
        steps=60,
        rounds=11,
    ),
    "transformer": Case(
        model=model_of("transformer", vocab_size=256, sequence_length=64),
        task=LANGUAGE_MODELLING,
        batch_size=4,
        target=1.02,
        steps=20,
        rounds=11,
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


class Clock:
    """CPU and wall time at each fetch of a batch: no hook of any framework is needed to measure it."""

    stamps: list[tuple[float, float]] = []  # noqa: RUF012  one process measures one variant at a time

    @classmethod
    def measured_us(cls) -> tuple[float, float]:
        """CPU and wall microseconds a step after the warm-up; CPU of all threads of this process."""
        first, last = cls.stamps[WARM_UP], cls.stamps[-1]
        steps = len(cls.stamps) - 1 - WARM_UP
        return (last[0] - first[0]) / steps * 1e6, (last[1] - first[1]) / steps * 1e6


class Stream:
    """An epoch of `steps` batches held in memory, so that reading data is no part of what is compared."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        self.batches = batches
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        Clock.stamps.clear()
        for step in range(self.steps):
            Clock.stamps.append((time.process_time(), time.perf_counter()))
            yield self.batches[step % len(self.batches)]


class Batches(LightningDataModule):
    """The stream as the data module of a run."""

    def __init__(self, case: str, steps: int) -> None:
        super().__init__()
        self.stream = Stream(batches_of(case, Rank.from_environment().rank), steps)

    def train_dataloader(self) -> Stream:
        return self.stream
