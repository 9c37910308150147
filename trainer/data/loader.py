"""DataLoaders rebuilt so that they resume exactly and give the same global batches at any world size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.dataloader import default_collate

from trainer.config.batch import BatchPlan
from trainer.data.order import EvaluationBatches, GlobalBatchSampler, Order
from trainer.data.randomness import generators_untouched, mix, seed_sample

_log = logging.getLogger(__name__)


@runtime_checkable
class Gathers(Protocol):
    """A dataset of fixed-width samples: one gather makes a collated batch.

    Fetched in this process: a worker process costs about 33 microseconds for each 8 KB sample, ten times what
    the whole read of it takes here.
    """

    def __len__(self) -> int: ...

    def gather(self, indices: torch.Tensor, epoch: int) -> Any:
        """The batch of the (n,) sample ids. Anything random in it is a function of seed, epoch and id."""
        ...


@runtime_checkable
class OfEpoch(Protocol):
    """A dataset in which an id means another sample in another epoch."""

    def of_epoch(self, epoch: int, index: int) -> Any:
        """The sample."""
        ...


class SeededBatches(Dataset[Any]):
    """A dataset whose `dataset[i]` sees generators seeded by (seed, epoch, i), with and without workers.

    It also collates: a random collate function then goes on from its last sample's state, not from that of a
    worker process, which does not survive a resume. Indices come as `epoch * len(dataset) + i`: a worker has no
    other way to learn the epoch. A dataset that draws no random numbers says `random = False`; then, with the
    default collate function, nothing is seeded.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.length = len(dataset)  # type: ignore[arg-type]
        self.seeds = getattr(dataset, "random", True) is not False or collate is not default_collate
        self.fetch_many = getattr(dataset, "__getitems__", None)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, tagged: int) -> Any:
        return self.__getitems__([tagged])

    def __getitems__(self, tagged: Sequence[int]) -> Any:
        """A collated batch. A dataset's own `__getitems__` gets one id at a time if it may be random: which ids
        share a batch depends on the world size, a sample must not."""
        pairs = [divmod(number, self.length) for number in tagged]
        if not self.seeds:
            ids = [index for _, index in pairs]
            return self.collate(self.fetch_many(ids) if self.fetch_many else [self._one(*pair) for pair in pairs])
        with generators_untouched():
            return self.collate([self._seeded(epoch, index) for epoch, index in pairs])

    def _seeded(self, epoch: int, index: int) -> Any:
        seed_sample(self.seed, epoch, index)
        return self.fetch_many([index])[0] if self.fetch_many else self._one(epoch, index)

    def _one(self, epoch: int, index: int) -> Any:
        return self.dataset.of_epoch(epoch, index) if isinstance(self.dataset, OfEpoch) else self.dataset[index]


def _as_it_is(batch: Any) -> Any:
    return batch


class OrderedLoader(DataLoader[Any]):
    """A DataLoader over one of our samplers, which it tells of each batch that it hands out.

    Its `dataset` is the user's own: a module may look at it for the shape of a sample.
    """

    batch_sampler: GlobalBatchSampler | EvaluationBatches  # type: ignore[assignment]
    _reads = False
    """Whether an iterator is being made, which reads through `SeededBatches`."""

    @property
    def dataset(self) -> Any:  # type: ignore[override]
        given = self._given
        return given.dataset if isinstance(given, SeededBatches) and not self._reads else given

    @dataset.setter
    def dataset(self, given: Any) -> None:
        self._given = given

    def _get_iterator(self) -> Any:
        self._reads = True
        try:
            return super()._get_iterator()
        finally:
            self._reads = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        delivered = self.batch_sampler.delivered
        batches = self._gathered() if isinstance(self.dataset, Gathers) else super().__iter__()
        for batch in batches:
            delivered()
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position in optimizer steps; Lightning saves it with its loops and asks for it on resume."""
        epoch, step = self.batch_sampler.position  # type: ignore[union-attr]
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.seek(state["epoch"], state["step"])  # type: ignore[union-attr]

    def _gathered(self) -> Iterator[Any]:
        gather = self.dataset.gather  # type: ignore[attr-defined]
        pin = self.pin_memory and torch.cuda.is_available()
        for epoch, ids in self.batch_sampler.rows():
            batch = gather(ids, epoch)
            yield tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch) if pin else batch


def resumable(loader: DataLoader[Any], plan: BatchPlan, rank: int, seed: int) -> DataLoader[Any]:
    """`loader` with a GlobalBatchSampler as its `batch_sampler`; its own batch size and sampler give way to `plan`.

    A sampler of the user's own keeps its say: its order of an epoch is drawn once on every rank with generators
    seeded by (seed, epoch). What has no order to take over is returned as it is, with a warning: an
    IterableDataset, a batch sampler of the user's own, `batch_size=None`.
    """
    sampler = _sampler_to_replace(loader)
    if sampler is None:
        return loader
    samples = loader.dataset
    if isinstance(sampler, (RandomSampler, SequentialSampler, DistributedSampler)):
        shuffle = sampler.shuffle if isinstance(sampler, DistributedSampler) else isinstance(sampler, RandomSampler)
        batches = GlobalBatchSampler(len(samples), plan, rank, seed, shuffle)  # type: ignore[arg-type]
    else:
        batches = GlobalBatchSampler(len(sampler), plan, rank, seed, order=_order_of(sampler, seed))  # type: ignore[arg-type]
    return _rebuilt(loader, batches, seed)


def evaluation(loader: DataLoader[Any], rank: int, world_size: int, seed: int = 0) -> DataLoader[Any]:
    """`loader` so that each sample is read once over all ranks; see `EvaluationBatches`.

    Keeps the loader's batch size as that of a rank. Sequential: shuffling cannot change a sum over all samples.
    """
    if _sampler_to_replace(loader) is None:
        return loader
    samples = len(loader.dataset)  # type: ignore[arg-type]
    return _rebuilt(loader, EvaluationBatches(samples, loader.batch_size or 1, rank, world_size), seed)


def first_samples(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """`loader` over the first `count` samples of its dataset, always in the same order: a model must be able to
    learn so few by heart, or something is wrong with it, its loss or its optimizer."""
    samples = range(min(count, len(loader.dataset)))  # type: ignore[arg-type]
    subset = Subset(loader.dataset, samples)
    return DataLoader(subset, loader.batch_size, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory)


def _sampler_to_replace(loader: DataLoader[Any]) -> Sampler[int] | None:
    if isinstance(loader.dataset, IterableDataset) or type(loader.batch_sampler) is not BatchSampler:
        _log.warning(
            "%s over %s keeps its own order: it will not resume exactly, and must itself give each rank its share",
            type(loader).__name__,
            type(loader.dataset).__name__,
        )
        return None
    return loader.batch_sampler.sampler  # type: ignore[return-value]


def _order_of(sampler: Sampler[int], seed: int) -> Order:
    """The order that a sampler of the user's own gives when every generator starts from (seed, epoch)."""

    def order(epoch: int) -> torch.Tensor:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        generator = getattr(sampler, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(mix(seed, epoch) >> 1)
        with generators_untouched():
            seed_sample(seed, epoch, 0)
            return torch.tensor(list(sampler))

    return order


def _rebuilt(loader: DataLoader[Any], batches: GlobalBatchSampler | EvaluationBatches, seed: int) -> DataLoader[Any]:
    dataset = loader.dataset
    workers = loader.num_workers
    if isinstance(dataset, Gathers):
        workers = 0
    else:
        batches.tag_epoch = True
        dataset = SeededBatches(dataset, loader.collate_fn, seed)
    keywords: dict[str, Any] = {}
    if workers:
        keywords = {
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
        }
    return OrderedLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=loader.pin_memory,
        # Its own: iter() draws a seed, and must not take it from the global generator.
        generator=torch.Generator().manual_seed(mix(seed) >> 1),
        **keywords,
    )
