"""Several data sources in one training, each with a weight, in an order that resumes exactly and at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from trainer.config.problems import raise_all
from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule
from trainer.data.files import SPLITS
from trainer.data.mixture_weights import problems_of_weights
from trainer.data.order import KEYED, MOST_IN_TABLE, Lookup
from trainer.data.permutation import KeyedPermutation
from trainer.data.randomness import mix
from trainer.data.seeded import SupportsGather, lookup_order, supports_gather

TABLE: Literal["table"] = "table"
SHARED = ("input_shape", "output_shape", "num_classes", "vocab_size", "sequence_length", "pad_id", "document_end")
"""Facts on which the sources must agree so that their samples can share a batch and a model."""


class MixtureOrder:
    """Maps the ids of an epoch to samples of the sources: `counts[k]` of them belong to source k.

    Each source goes through its samples in its own order, a new one in each pass, and continues in the next epoch where
    this one ends. So no sample is read twice before all samples of its source were read once, whatever the weight. The
    sample of an id is a function of (seed, epoch, id): ranks and a resume need nothing else.

    Args:
        lengths: Samples of each source.
        counts: Samples per epoch of each source.
        seed: Seed of the orders.
        shuffle: As in `Mixture`.
        lookups: For each source its own order by pass and position, or None.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        counts: Sequence[int],
        seed: int,
        shuffle: str = TABLE,
        lookups: Sequence[Lookup | None] | None = None,
    ) -> None:
        self.lengths, self.counts, self.seed, self.shuffle = list(lengths), list(counts), seed, shuffle
        self.lookups = list(lookups or [None] * len(self.lengths))
        self._ends = numpy.cumsum(counts)
        self._orders: dict[tuple[int, int], Callable[[torch.Tensor], torch.Tensor]] = {}
        """(source, pass) to its order, for the passes that were read last."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, ids: torch.Tensor, epoch: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Yield source, pass, its sample ids, and their positions among the `(batch,)` ids."""
        owners = torch.from_numpy(numpy.searchsorted(self._ends, ids.numpy(), side="right"))
        used = {}
        for source, count in enumerate(self.counts):
            mine = torch.nonzero(owners == source).flatten()
            length = self.lengths[source]
            # Number of samples of the source before this one, from the start of the training.
            before = ids[mine] - (int(self._ends[source]) - count) + epoch * count
            passes = before // length
            for number in torch.unique(passes).tolist():
                in_pass = passes == number
                order = self._order(source, number)
                used[source, number] = order
                yield source, number, order(before[in_pass] % length).long(), mine[in_pass]
        sources_read = {source for source, _ in used}
        self._orders = {key: order for key, order in self._orders.items() if key[0] not in sources_read} | used

    def _order(self, source: int, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from positions in a pass over a source to its samples."""
        order = self._orders.get((source, number))
        if order is not None:
            return order
        lookup = self.lookups[source]
        if lookup is not None:
            return partial(lookup, number)
        length, key = self.lengths[source], (self.seed, source + 1, number)
        if self.shuffle == KEYED and length > MOST_IN_TABLE:
            return KeyedPermutation(length, *key)
        generator = torch.Generator().manual_seed(mix(*key) >> 1)
        kind = torch.int32 if length < 2**31 else torch.int64
        return torch.randperm(length, generator=generator, dtype=kind).__getitem__


class GatherMixture(Dataset[Any]):
    """An epoch of sources that are read batch by batch; supports `gather`, see `seeded.SupportsGather`.

    Randomness in a source is seeded by its own pass (see `MixtureOrder`).

    Args:
        sources: Datasets whose batches have the same shapes but for the batch size.
        counts: Samples per epoch of each source.
        seed: Seed of the orders.
        shuffle: As in `Mixture`.
    """

    random = False

    def __init__(
        self, sources: Sequence[SupportsGather], counts: Sequence[int], seed: int, shuffle: str = TABLE
    ) -> None:
        self.sources = list(sources)
        lookups = [lookup_order(source, mix(seed, number)) for number, source in enumerate(sources, 1)]
        self.order = MixtureOrder([len(source) for source in sources], counts, seed, shuffle, lookups)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.gather(torch.tensor([index]), 0))

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:
        """Return the batch of the `(batch,)` sample ids, in their order."""
        positions, parts = [], []
        for source, number, samples, where in self.order.locate(indices.long(), epoch):
            parts.append(self.sources[source].gather(samples, number))
            positions.append(where)
        back = torch.cat(positions).argsort()
        return tuple(torch.cat(tensors).index_select(0, back) for tensors in zip(*parts, strict=True))


class ItemMixture(Dataset[Any]):
    """An epoch of sources that are read item by item, such as class folders.

    It has `of_epoch`, see `seeded.SupportsOfEpoch` and `MixtureOrder`.

    Args:
        sources: Map-style datasets.
        counts: Samples per epoch of each source.
        seed: Seed of the orders.
        shuffle: As in `Mixture`.
    """

    def __init__(self, sources: Sequence[Any], counts: Sequence[int], seed: int, shuffle: str = TABLE) -> None:
        self.sources = list(sources)
        self.order = MixtureOrder([len(source) for source in sources], counts, seed, shuffle)
        self.random = any(getattr(source, "random", True) for source in sources)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.of_epoch(0, index)

    def of_epoch(self, epoch: int, index: int) -> Any:
        """Return the sample at `index` in `epoch`."""
        ((source, _, samples, _),) = self.order.locate(torch.tensor([index]), epoch)
        return self.sources[source][int(samples[0])]


class GatherConcat(Dataset[Any]):
    """The samples of all sources, once each; supports `gather`, see `seeded.SupportsGather`."""

    random = False

    def __init__(self, sources: Sequence[SupportsGather]) -> None:
        self.sources = list(sources)
        self._ends = numpy.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, ...]:
        """Return the batch of the `(batch,)` sample ids, which an evaluation reads in ascending order."""
        owners = numpy.searchsorted(self._ends, indices.numpy(), side="right")
        parts = []
        for source in numpy.unique(owners):
            begin = int(self._ends[source]) - len(self.sources[source])
            parts.append(self.sources[source].gather(indices[torch.from_numpy(owners == source)] - begin, epoch))
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


class Mixture(ArrayDataModule):
    """Training data of several data modules by weight; their held-out data unweighted, one source after another.

    Batches have the shapes of the sources' batches, which must agree.

    Args:
        sources: Name to data module.
        weights: Name to its share of the samples, relative to the sum; None: by size.
        batch_size: Global batch size.
        samples: Samples per epoch; None: as many as the sources have together.
        seed: Seed of the order within a source.
        num_workers: Worker processes per rank that read sources item by item.
        shuffle: How a source of more than 4,194,304 samples is shuffled: `keyed` computes its order piece by piece,
            `table` holds all of it in memory, as mixtures did before there was `keyed`.
    """

    def __init__(
        self,
        sources: Mapping[str, LightningDataModule],
        weights: Mapping[str, float] | None = None,
        batch_size: int = 32,
        *,
        samples: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        shuffle: Literal["keyed", "table"] = TABLE,
    ) -> None:
        super().__init__(batch_size)
        self.shuffle = shuffle
        self.sources, self.samples, self.seed, self.num_workers = dict(sources), samples, seed, num_workers
        if weights is not None:
            raise_all(list(problems_of_weights(weights, self.sources)))
        self.weights = weights
        self.default_task = next(iter(self.sources.values())).default_task  # type: ignore[attr-defined]

    def prepare_data(self) -> None:
        """Prepare all sources. Runs on one rank of each node."""
        for source in self.sources.values():
            source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up all sources and build the dataset of each split, once."""
        if self.train is not None:
            return
        for source in self.sources.values():
            source.setup("fit")
        parts = {split: [getattr(one, split) for one in self.sources.values()] for split in SPLITS}
        self.evaluation_batch = min(getattr(one, "evaluation_batch", 1) for one in self.sources.values())
        sizes = [len(part) for part in parts["train"]]
        weights = sizes if self.weights is None else [self.weights[name] for name in self.sources]
        counts = apportion(weights, self.samples or sum(sizes))
        if self._read_by_batch(parts["train"]):
            self.train = GatherMixture(parts["train"], counts, self.seed, self.shuffle)
            self.val, self.test = GatherConcat(parts["val"]), GatherConcat(parts["test"])
        else:
            self.train = ItemMixture(parts["train"], counts, self.seed, self.shuffle)
            self.val, self.test = ConcatDataset(parts["val"]), ConcatDataset(parts["test"])

    def _read_by_batch(self, parts: Sequence[Any]) -> bool:
        by_batch = {name: supports_gather(part) for name, part in zip(self.sources, parts, strict=True)}
        if len(set(by_batch.values())) > 1:
            one, other = (next(name for name, value in by_batch.items() if value is kind) for kind in (True, False))
            raise UserError(
                f"data.sources.{one} is read batch by batch and data.sources.{other} item by item: cannot mix them",
                "mix text, token shards and arrays in memory, or class folders (docs/data.md)",
            )
        return all(by_batch.values())

    def _loader(self, dataset: Dataset[Any] | None, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        assert dataset is not None, "call setup() first"
        workers = 0 if supports_gather(dataset) else self.num_workers
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
        """Return the facts on which the sources agree.

        Raises:
            UserError: The sources differ in a fact of `SHARED` or in their classes.
        """
        facts = {name: source.facts() for name, source in self.sources.items()}  # type: ignore[attr-defined]
        first, expected = next(iter(facts.items()))
        for name, other in facts.items():
            for key in SHARED:
                if other.get(key) != expected.get(key):
                    fix = f"give the sources of data.sources the same {key}"
                    raise UserError(f"{key} is {expected.get(key)} in {first} and {other.get(key)} in {name}", fix)
        classes = {name: getattr(source, "classes", None) for name, source in self.sources.items()}
        for name, own_classes in classes.items():
            if own_classes != classes[first]:
                fix = "give the sources of data.sources the same classes"
                raise UserError(f"{first} has the classes {classes[first]} and {name} has {own_classes}", fix)
        merged = dict(expected)
        if all("bytes_per_token" in other for other in facts.values()):
            sizes = numpy.array([len(one.val) for one in self.sources.values()])  # type: ignore[attr-defined]
            merged["bytes_per_token"] = float(
                sizes @ [other["bytes_per_token"] for other in facts.values()] / sizes.sum()
            )
        return merged


def apportion(weights: Sequence[float], samples: int) -> list[int]:
    """Divide `samples` in proportion to `weights` by the largest remainder method."""
    exact = numpy.asarray(weights, dtype=float) / sum(weights) * samples
    counts = numpy.floor(exact).astype(int)
    for index in numpy.argsort(counts - exact, kind="stable")[: samples - counts.sum()]:
        counts[index] += 1
    return [int(count) for count in counts]
