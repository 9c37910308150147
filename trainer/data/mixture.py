"""Several sources in one training, each with its weight, in an order that is exact and elastic like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from trainer.config.own import problems_of_weights
from trainer.config.problems import raise_all
from trainer.data.arrays import ArrayDataModule
from trainer.data.loader import Gathers
from trainer.data.randomness import mix
from trainer.errors import UserError

SHARED = ("input_shape", "output_shape", "num_classes", "vocab_size", "sequence_length")
"""Facts in which the sources must agree, for their samples to share a batch and a model."""


class Mixed(Dataset[Any]):
    """An epoch of `sum(counts)` samples, `counts[k]` of them from source k; see `loader.Gathers`.

    A source goes through its samples in an order of its own, a new one in each pass, and goes on in the next epoch
    where this one ends. So nothing of it is read twice before all of it was read once, whatever its weight. Which
    sample an id means is a function of (seed, epoch, id): the ranks and a resume need nothing else. Randomness in a
    source is seeded by its own pass.
    """

    random = False

    def __init__(self, sources: Sequence[Gathers], counts: Sequence[int], seed: int) -> None:
        self.sources, self.counts, self.seed = list(sources), list(counts), seed
        self._ends = numpy.cumsum(counts)
        self._orders: dict[tuple[int, int], torch.Tensor] = {}
        """(source, pass) to its order, of the passes that were read last."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.gather(torch.tensor([index]), 0))

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:
        """The batch of these (n,) ids."""
        ids = indices.long()
        owners = torch.from_numpy(numpy.searchsorted(self._ends, ids.numpy(), side="right"))
        places, parts, used = [], [], {}
        for source, count in enumerate(self.counts):
            mine = torch.nonzero(owners == source).flatten()
            length = len(self.sources[source])
            # How many samples of the source come before this one, from the start of the training.
            before = ids[mine] - (int(self._ends[source]) - count) + epoch * count
            passes = before // length
            for number in passes.unique().tolist():
                here = passes == number
                order = self._order(source, number)
                used[source, number] = order
                parts.append(self.sources[source].gather(order[before[here] % length].long(), number))
                places.append(mine[here])
        now = {source for source, _ in used}
        self._orders = {key: order for key, order in self._orders.items() if key[0] not in now} | used
        back = torch.cat(places).argsort()
        return tuple(torch.cat(tensors).index_select(0, back) for tensors in zip(*parts, strict=True))

    def _order(self, source: int, number: int) -> torch.Tensor:
        known = self._orders.get((source, number))
        if known is not None:
            return known
        generator = torch.Generator().manual_seed(mix(self.seed, source + 1, number) >> 1)
        length = len(self.sources[source])
        return torch.randperm(length, generator=generator, dtype=torch.int32 if length < 2**31 else torch.int64)


class OneAfterAnother(Dataset[Any]):
    """The samples of all sources, once each; see `loader.Gathers`."""

    random = False

    def __init__(self, sources: Sequence[Gathers]) -> None:
        self.sources = list(sources)
        self._ends = numpy.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:
        """The batch of these (n,) ids, which an evaluation reads in rising order."""
        owners = numpy.searchsorted(self._ends, indices.numpy(), side="right")
        parts = []
        for source in numpy.unique(owners):
            begin = int(self._ends[source]) - len(self.sources[source])
            parts.append(self.sources[source].gather(indices[torch.from_numpy(owners == source)] - begin, epoch))
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


class Mixture(ArrayDataModule):
    """Training data of several data modules by weight; their held-out data, all of it, one after another."""

    def __init__(
        self,
        sources: Mapping[str, LightningDataModule],
        weights: Mapping[str, float] | None = None,
        batch_size: int = 32,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        """`sources`: name to data module. `weights`: name to the share of the samples, of any sum; null: by size.

        `samples`: of an epoch; null: as many as the sources have together. `seed`: of the order within a source.
        """
        super().__init__(batch_size)
        self.sources, self.samples, self.seed = dict(sources), samples, seed
        if weights is not None:
            raise_all(list(problems_of_weights(weights, self.sources)))
        self.weights = weights
        self.default_task = next(iter(self.sources.values())).default_task  # type: ignore[attr-defined]

    def prepare_data(self) -> None:
        for source in self.sources.values():
            source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        for source in self.sources.values():
            source.setup("fit")
        parts = {split: [_gathering(name, one, split) for name, one in self.sources.items()] for split in _SPLITS}
        self.evaluation_batch = min(getattr(one, "evaluation_batch", 1) for one in self.sources.values())
        sizes = [len(part) for part in parts["train"]]
        weights = sizes if self.weights is None else [self.weights[name] for name in self.sources]
        self.train = Mixed(parts["train"], shares(weights, self.samples or sum(sizes)), self.seed)
        self.val, self.test = OneAfterAnother(parts["val"]), OneAfterAnother(parts["test"])

    def facts(self) -> dict[str, Any]:
        facts = {name: source.facts() for name, source in self.sources.items()}  # type: ignore[attr-defined]
        first, known = next(iter(facts.items()))
        for name, own in facts.items():
            for key in SHARED:
                if own.get(key) != known.get(key):
                    fix = f"give the sources of data.sources the same {key}"
                    raise UserError(f"{key} is {known.get(key)} in {first} and {own.get(key)} in {name}", fix)
        found = dict(known)
        if all("bytes_per_token" in own for own in facts.values()):
            sizes = numpy.array([len(one.val) for one in self.sources.values()])  # type: ignore[attr-defined]
            found["bytes_per_token"] = float(sizes @ [own["bytes_per_token"] for own in facts.values()] / sizes.sum())
        return found


_SPLITS = ("train", "val", "test")


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """`samples` in proportion to `weights`; what rounding leaves goes to the largest remainders."""
    exact = numpy.asarray(weights, dtype=float) / sum(weights) * samples
    counts = numpy.floor(exact).astype(int)
    for index in numpy.argsort(counts - exact, kind="stable")[: samples - counts.sum()]:
        counts[index] += 1
    return [int(count) for count in counts]


def _gathering(name: str, source: Any, split: str) -> Gathers:
    found = getattr(source, split, None)
    if not isinstance(found, Gathers):
        raise UserError(
            f"data.sources.{name}: {type(source).__name__} reads its samples one by one",
            "mix data that is read batch by batch: text, token_shards, arrays in memory (docs/data.md)",
        )
    return found
