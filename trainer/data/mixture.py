"""Several sources in one training, each with its weight, in an order that is exact and elastic like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from trainer.config.problems import raise_all
from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule
from trainer.data.files import SPLITS
from trainer.data.loader import Gathers, gathers
from trainer.data.mixture_weights import problems_of_weights
from trainer.data.randomness import mix

SHARED = ("input_shape", "output_shape", "num_classes", "vocab_size", "sequence_length", "pad_id")
"""Facts in which the sources must agree, for their samples to share a batch and a model."""


class Picks:
    """Which sample of which source the ids of an epoch mean: `counts[k]` of them are of source k.

    A source goes through its samples in an order of its own, a new one in each pass, and goes on in the next epoch
    where this one ends. So nothing of it is read twice before all of it was read once, whatever its weight. Which
    sample an id means is a function of (seed, epoch, id): the ranks and a resume need nothing else.
    """

    def __init__(self, lengths: Sequence[int], counts: Sequence[int], seed: int) -> None:
        self.lengths, self.counts, self.seed = list(lengths), list(counts), seed
        self._ends = numpy.cumsum(counts)
        self._orders: dict[tuple[int, int], torch.Tensor] = {}
        """(source, pass) to its order, of the passes that were read last."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def of(self, ids: torch.Tensor, epoch: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Source, pass, the samples of it, and their places among the (n,) ids."""
        owners = torch.from_numpy(numpy.searchsorted(self._ends, ids.numpy(), side="right"))
        used = {}
        for source, count in enumerate(self.counts):
            mine = torch.nonzero(owners == source).flatten()
            length = self.lengths[source]
            # How many samples of the source come before this one, from the start of the training.
            before = ids[mine] - (int(self._ends[source]) - count) + epoch * count
            passes = before // length
            for number in passes.unique().tolist():
                here = passes == number
                order = self._order(source, number)
                used[source, number] = order
                yield source, number, order[before[here] % length].long(), mine[here]
        now = {source for source, _ in used}
        self._orders = {key: order for key, order in self._orders.items() if key[0] not in now} | used

    def _order(self, source: int, number: int) -> torch.Tensor:
        known = self._orders.get((source, number))
        if known is not None:
            return known
        generator = torch.Generator().manual_seed(mix(self.seed, source + 1, number) >> 1)
        length = self.lengths[source]
        return torch.randperm(length, generator=generator, dtype=torch.int32 if length < 2**31 else torch.int64)


class Mixed(Dataset[Any]):
    """An epoch of sources that are read batch by batch; see `Picks` and `loader.Gathers`. Randomness in a source is
    seeded by its own pass."""

    random = False

    def __init__(self, sources: Sequence[Gathers], counts: Sequence[int], seed: int) -> None:
        self.sources = list(sources)
        self.picks = Picks([len(source) for source in sources], counts, seed)

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.gather(torch.tensor([index]), 0))

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:
        """The batch of these (n,) ids."""
        places, parts = [], []
        for source, number, samples, here in self.picks.of(indices.long(), epoch):
            parts.append(self.sources[source].gather(samples, number))
            places.append(here)
        back = torch.cat(places).argsort()
        return tuple(torch.cat(tensors).index_select(0, back) for tensors in zip(*parts, strict=True))


class MixedOneByOne(Dataset[Any]):
    """An epoch of sources that are read one by one, such as class folders; see `Picks` and `loader.OfEpoch`."""

    def __init__(self, sources: Sequence[Any], counts: Sequence[int], seed: int) -> None:
        self.sources = list(sources)
        self.picks = Picks([len(source) for source in sources], counts, seed)
        self.random = any(getattr(source, "random", True) for source in sources)

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> Any:
        return self.of_epoch(0, index)

    def of_epoch(self, epoch: int, index: int) -> Any:
        """The sample that this id means in the epoch."""
        (found,) = self.picks.of(torch.tensor([index]), epoch)
        source, _, samples, _ = found
        return self.sources[source][int(samples[0])]


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
        num_workers: int = 0,
    ) -> None:
        """`sources`: name to data module. `weights`: name to the share of the samples, of any sum; null: by size.

        `samples`: of an epoch; null: as many as the sources have together. `seed`: of the order within a source.
        `num_workers`: processes a rank that read sources whose samples are read one by one.
        """
        super().__init__(batch_size)
        self.sources, self.samples, self.seed, self.num_workers = dict(sources), samples, seed, num_workers
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
        parts = {split: [getattr(one, split) for one in self.sources.values()] for split in SPLITS}
        self.evaluation_batch = min(getattr(one, "evaluation_batch", 1) for one in self.sources.values())
        sizes = [len(part) for part in parts["train"]]
        weights = sizes if self.weights is None else [self.weights[name] for name in self.sources]
        counts = shares(weights, self.samples or sum(sizes))
        if self._read_by_batch(parts["train"]):
            self.train = Mixed(parts["train"], counts, self.seed)
            self.val, self.test = OneAfterAnother(parts["val"]), OneAfterAnother(parts["test"])
        else:
            self.train = MixedOneByOne(parts["train"], counts, self.seed)
            self.val, self.test = ConcatDataset(parts["val"]), ConcatDataset(parts["test"])

    def _read_by_batch(self, parts: Sequence[Any]) -> bool:
        by_batch = {name: gathers(part) for name, part in zip(self.sources, parts, strict=True)}
        if len(set(by_batch.values())) > 1:
            one, other = (next(name for name, found in by_batch.items() if found is kind) for kind in (True, False))
            raise UserError(
                f"data.sources.{one} is read batch by batch and data.sources.{other} one by one: they do not mix",
                "mix text, token shards and arrays in memory, or class folders (docs/data.md)",
            )
        return all(by_batch.values())

    def _loader(self, dataset: Dataset[Any] | None, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        assert dataset is not None, "setup() comes first"
        workers = 0 if gathers(dataset) else self.num_workers
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def facts(self) -> dict[str, Any]:
        facts = {name: source.facts() for name, source in self.sources.items()}  # type: ignore[attr-defined]
        first, known = next(iter(facts.items()))
        for name, own in facts.items():
            for key in SHARED:
                if own.get(key) != known.get(key):
                    fix = f"give the sources of data.sources the same {key}"
                    raise UserError(f"{key} is {known.get(key)} in {first} and {own.get(key)} in {name}", fix)
        classes = {name: getattr(source, "classes", None) for name, source in self.sources.items()}
        for name, own_classes in classes.items():
            if own_classes != classes[first]:
                fix = "give the sources of data.sources the same classes"
                raise UserError(f"{first} has the classes {classes[first]} and {name} has {own_classes}", fix)
        found = dict(known)
        if all("bytes_per_token" in own for own in facts.values()):
            sizes = numpy.array([len(one.val) for one in self.sources.values()])  # type: ignore[attr-defined]
            found["bytes_per_token"] = float(sizes @ [own["bytes_per_token"] for own in facts.values()] / sizes.sum())
        return found


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """`samples` in proportion to `weights`; what rounding leaves goes to the largest remainders."""
    exact = numpy.asarray(weights, dtype=float) / sum(weights) * samples
    counts = numpy.floor(exact).astype(int)
    for index in numpy.argsort(counts - exact, kind="stable")[: samples - counts.sum()]:
        counts[index] += 1
    return [int(count) for count in counts]
