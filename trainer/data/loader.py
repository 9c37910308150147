"""DataLoaders rebuilt so that they resume exactly and give the same global batches at any world size."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import index
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
    SequentialSampler,
    Subset,
)
from torch.utils.data.dataloader import default_collate

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.data.order import Batches, EvaluationBatches, GlobalBatchSampler, ListedBatches
from trainer.data.randomness import generators_untouched, mix, seed_sample
from trainer.data.ranks import Ranks, Shares
from trainer.data.stream import Stream, is_stateful
from trainer.runtime import frozen, namespaces

_log = logging.getLogger(__name__)

# Already done in a rank. A worker process that was spawned has imported nothing of the rank's; to read the dataset it
# needs this file, and before the user's.
frozen.install()
namespaces.install()


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


def gathers(dataset: object) -> bool:
    """Whether it is a `Gathers`. A tensor, which may be a dataset, has another method of that name, and what wraps one
    may hand it out."""
    return isinstance(dataset, Gathers) and hasattr(type(dataset), "gather") and not isinstance(dataset, torch.Tensor)


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
        # Asked once: of a protocol it takes several microseconds on Python 3.11, and this is for each sample.
        self.of_epoch = dataset.of_epoch if isinstance(dataset, OfEpoch) else None

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
        return self.dataset[index] if self.of_epoch is None else self.of_epoch(epoch, index)


class SeededUnits(Dataset[Any]):
    """Like `SeededBatches` for batches that a batch sampler of the user's own has made (`ListedBatches`), or indices
    of whole batches (`batch_size=None`)."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = loader.dataset, loader.collate_fn, seed
        self.makes_batches = loader.batch_sampler is not None
        """Whether a unit is a list of indices, whose samples are collated."""
        self.fetch_many = getattr(loader.dataset, "__getitems__", None) if self.makes_batches else None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, unit: tuple[int, int, Any]) -> Any:
        return self.__getitems__(unit)

    def __getitems__(self, unit: tuple[int, int, Any]) -> Any:
        epoch, number, indices = unit
        with generators_untouched():
            seed_sample(self.seed, epoch, number)
            if not self.makes_batches:
                return self.collate(self.dataset[indices])
            return self.collate(self.fetch_many(indices) if self.fetch_many else [self.dataset[one] for one in indices])


def _as_it_is(batch: Any) -> Any:
    return batch


class Ordered:
    """A DataLoader over one of our samplers, which it tells of each batch that it hands out.

    `_rebuilt` puts it before the user's own class of loader: their collating, worker functions and `__iter__` stay.
    """

    batch_sampler: Batches | EvaluationBatches
    _reads = False
    """Whether an iterator is being made, which reads through `SeededBatches` or `SeededUnits`."""
    pin_memory: bool
    not_trained: Callable[[], int] = int
    """Batches handed out that nobody has trained on yet (`stream.Stream.not_trained`)."""
    epoch_is_over: Callable[[], bool] | None = None
    """Whether the training's epoch is; None: when this loader's is."""

    @property
    def dataset(self) -> Any:
        """The user's own: a module's `setup` may look at it for the shape of a sample."""
        given = vars(self)["dataset"]
        return given.dataset if isinstance(given, (SeededBatches, SeededUnits)) and not self._reads else given

    def _get_iterator(self) -> Any:
        self._reads = True
        try:
            return super()._get_iterator()  # type: ignore[misc]
        finally:
            self._reads = False

    def __iter__(self) -> Iterator[Any]:
        ours = self.batch_sampler
        batches = self._gathered() if gathers(self.dataset) else super().__iter__()  # type: ignore[misc]
        if isinstance(ours, EvaluationBatches):
            yield from batches
            return
        first = True
        for batch in batches:
            if first and not ours.asked:
                raise UserError(
                    f"{type(self).__name__}.__iter__ does not read through its batch_sampler: it cannot be sharded",
                    "call super().__iter__() in it, or shard it yourself: trainer.use_distributed_sampler=false",
                )
            first = False
            ours.delivered()
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def state_dict(self) -> dict[str, int]:
        """The position in micro-batches; Lightning saves it with its loops and asks for it on resume."""
        ours = self.batch_sampler
        assert isinstance(ours, Batches)
        behind = self.not_trained()
        over = ours.position[1] == 0 if self.epoch_is_over is None else self.epoch_is_over()
        return ours.state(behind, over)

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert isinstance(self.batch_sampler, Batches)
        if "epoch" in state:
            self.batch_sampler.load(state)
        else:
            _log.warning("%s: the checkpoint has the state of another kind of loader", type(self).__name__)

    def begin_with(self, epoch: int) -> None:
        """Make the next iteration the one of this epoch, from its beginning."""
        assert isinstance(self.batch_sampler, Batches)
        self.batch_sampler.seek(epoch, 0)

    def _gathered(self) -> Iterator[Any]:
        gather = self.dataset.gather
        pin = self.pin_memory and torch.cuda.is_available()
        for epoch, ids in self.batch_sampler.rows():  # type: ignore[union-attr]
            batch = gather(ids, epoch)
            yield tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch) if pin else batch


class OrderedLoader(Ordered, DataLoader[Any]):  # type: ignore[misc,override]
    """In the place of a plain DataLoader."""


def resumable(
    loader: DataLoader[Any], plan: BatchPlan, rank: int, seed: int, ranks: Ranks | None = None
) -> DataLoader[Any] | Stream:
    """`loader` with one of our samplers as its `batch_sampler`; its own batch size and sampler give way to `plan`.

    A sampler of the user's own keeps its say: its order of an epoch is drawn once on every rank with generators
    seeded by (seed, epoch), and shared if it is the same on all ranks; if it is not, each rank has its share already.
    The same with the batches of a batch sampler, and with `batch_size=None`. What has no order to take over is a
    `Stream`: an IterableDataset, a sampler without a length, a loader with a `state_dict` of its own.
    """
    ranks = ranks or Ranks(rank, plan.world_size)
    name = describe(loader)
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if _never_ends(loader):
        loader, sampler = _ending(loader), sampler.sampler  # type: ignore[union-attr]
    if _keeps_its_own_order(loader) or sized_len(sampler) is None:
        return Stream(loader, ranks, seed, name)
    if type(sampler) is not BatchSampler:
        return _rebuilt(loader, _listed(loader, _drawn(sampler, seed), ranks, plan, name), seed)
    inner = sampler.sampler
    shuffle = _shuffles(inner)
    if shuffle is not None:
        samples: int = len(getattr(inner, "data_source", loader.dataset))  # type: ignore[arg-type]
        batches: Batches = GlobalBatchSampler(samples, plan, rank, seed, shuffle, drop_last=sampler.drop_last)
        return _rebuilt(loader, batches, seed)
    if sized_len(inner) is None:
        return Stream(loader, ranks, seed, name)
    drawn = _drawn(inner, seed)
    indices = _integers(drawn(0))
    if indices is None:
        own = _cut(drawn, plan.micro_batch)
        return _rebuilt(loader, _listed(loader, own, ranks, plan, name), seed)
    batches = _own_order(indices, drawn, plan, ranks, seed, name, sampler.drop_last)
    return _rebuilt(loader, batches, seed)


def evaluation(
    loader: DataLoader[Any], rank: int, world_size: int, seed: int = 0, ranks: Ranks | None = None
) -> DataLoader[Any]:
    """`loader` so that each sample is read once over all ranks; see `EvaluationBatches`.

    Keeps the loader's batch size as that of a rank. Shuffling cannot change a sum over all samples, so there is none;
    a sampler of the user's own says which samples. What gives no order of samples is left as it is.
    """
    ranks = ranks or Ranks(rank, world_size)
    sampler = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or type(sampler) is not BatchSampler:
        if world_size > 1 and rank == 0:
            _log.warning("%s: as it is on every rank, which must itself see to its share", describe(loader))
        return loader
    order = None
    if _shuffles(sampler.sampler) is None:
        if sized_len(sampler.sampler) is None:
            return loader
        indices = _integers(_drawn(sampler.sampler, seed)(0))
        if ranks.compare(indices, describe(loader)) is Shares.OWN or indices is None:
            return loader
        order = torch.tensor(indices)
    samples = len(loader.dataset) if order is None else len(order)  # type: ignore[arg-type]
    batches = EvaluationBatches(samples, loader.batch_size or 1, rank, world_size)
    batches.order = order
    return _rebuilt(loader, batches, seed)


def first_samples(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """`loader` over the first `count` samples of its dataset, always in the same order: a model must be able to
    learn so few by heart, or something is wrong with it, its loss or its optimizer."""
    samples = range(min(count, len(loader.dataset)))  # type: ignore[arg-type]
    subset = Subset(loader.dataset, samples)
    return DataLoader(subset, loader.batch_size, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory)


def describe(loader: Any) -> str:
    """`Loader over Rows`, for messages."""
    dataset = getattr(loader, "dataset", None)
    kind = "train_dataloader" if isinstance(loader, (list, tuple)) else type(loader).__name__
    return kind if dataset is None else f"{kind} over {type(dataset).__name__}"


def sized_len(iterable: Any) -> int | None:
    """Its length; None where it has none."""
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return None


def _keeps_its_own_order(loader: DataLoader[Any]) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return True
    if not is_stateful(loader):
        return False
    # torchdata's loader over an ordinary dataset and order: our position says all that its state would
    known = type(loader).__module__.startswith("torchdata.")
    own_sampler = type(loader.batch_sampler) is not BatchSampler or _shuffles(loader.batch_sampler.sampler) is None
    return not known or own_sampler or is_stateful(loader.dataset)


def _never_ends(loader: DataLoader[Any]) -> bool:
    """Whether it keeps its workers by a batch sampler without an end, of which its own `__iter__` takes an epoch, as
    timm's and ultralytics' loaders do."""
    batches = loader.batch_sampler
    inner = getattr(batches, "sampler", None)
    return (
        sized_len(batches) is None and type(inner) is BatchSampler and type(loader).__iter__ is not DataLoader.__iter__
    )


def _ending(loader: DataLoader[Any]) -> DataLoader[Any]:
    """An ordinary one that keeps its workers."""
    ending: Any = object.__new__(DataLoader)
    inner = loader.batch_sampler.sampler  # type: ignore[union-attr]
    changed = {"batch_sampler": inner, "persistent_workers": loader.num_workers > 0, "_iterator": None}
    ending.__dict__.update({**vars(loader), **changed})
    return ending  # type: ignore[no-any-return]


def _shuffles(sampler: Any) -> bool | None:
    """Whether one of torch's own shuffles; None: a weighted one, a subset, one with replacement, the user's own."""
    if type(sampler) is DistributedSampler:
        return sampler.shuffle
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return True
    return False if type(sampler) is SequentialSampler else None


def _drawn(sampler: Any, seed: int) -> Callable[[int], list[Any]]:
    """What a sampler of the user's own gives when every generator starts from (seed, epoch)."""

    def drawn(epoch: int) -> list[Any]:
        own: Any = (sampler, getattr(sampler, "sampler", None))
        for one in own:
            if callable(getattr(one, "set_epoch", None)):
                one.set_epoch(epoch)
            generator = getattr(one, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(mix(seed, epoch) >> 1)
        with generators_untouched():
            seed_sample(seed, epoch, 0)
            return list(itertools.islice(sampler, len(sampler)))

    return drawn


def _integers(indices: list[Any]) -> list[int] | None:
    """As Python's integers, also of NumPy and torch; None where they are something else."""
    try:
        return [index(one) for one in indices]
    except TypeError:
        return None


def _own_order(
    indices: list[int],
    drawn: Callable[[int], list[Any]],
    plan: BatchPlan,
    ranks: Ranks,
    seed: int,
    name: str,
    drop_last: bool,
) -> GlobalBatchSampler:
    """Samples in the order of a sampler of the user's own; `indices`: those of the first epoch."""

    def order(epoch: int) -> torch.Tensor:
        return torch.tensor(_integers(drawn(epoch)) if epoch else indices)

    if ranks.compare(indices, name) is Shares.SAME:
        return GlobalBatchSampler(len(indices), plan, ranks.rank, seed, order=order, drop_last=drop_last)
    _say_own(name, ranks)
    drawn = _as_many(drawn, len(indices), name)
    alone = replace(plan, global_batch=plan.micro_batch * plan.accumulate, world_size=1)
    fewest = ranks.least(len(indices))
    return GlobalBatchSampler(fewest or 0, alone, 0, seed, order=order, drop_last=drop_last)


def _listed(
    loader: DataLoader[Any], drawn: Callable[[int], list[Any]], ranks: Ranks, plan: BatchPlan, name: str
) -> ListedBatches:
    """Whole batches in the order of the user's own: in turn to the ranks, or this rank's where they differ."""
    if ranks.compare(drawn(0), name) is Shares.SAME:
        return ListedBatches(drawn, ranks.rank, ranks.world_size, plan.accumulate)
    _say_own(name, ranks)
    fewest = ranks.least(len(drawn(0)))
    drawn = _as_many(drawn, fewest or 0, name)
    return ListedBatches(lambda epoch: drawn(epoch)[:fewest], 0, 1, plan.accumulate)


def _as_many(drawn: Callable[[int], list[Any]], count: int, name: str) -> Callable[[int], list[Any]]:
    """Of each rank's own, no later epoch may have less than the first: the other ranks would wait for ever."""

    def as_many(epoch: int) -> list[Any]:
        found = drawn(epoch)
        if len(found) < count:
            raise UserError(
                f"{name}: its sampler gives this rank {len(found)} in epoch {epoch}, and {count} in the first epoch",
                "give each rank as many in every epoch",
            )
        return found

    return as_many


def _say_own(name: str, ranks: Ranks) -> None:
    if ranks.rank == 0:
        _log.warning("%s: its sampler gives each rank its own samples; they are left as they are", name)


def _cut(drawn: Callable[[int], list[Any]], size: int) -> Callable[[int], list[Any]]:
    """Batches of `size` of what a sampler gives; what is left over at the end is left out."""

    def listed(epoch: int) -> list[Any]:
        indices = drawn(epoch)
        return [indices[begin : begin + size] for begin in range(0, len(indices) - size + 1, size)]

    return listed


def _rebuilt(loader: DataLoader[Any], batches: Batches | EvaluationBatches, seed: int) -> DataLoader[Any]:
    """A copy of the user's loader, whatever its `__init__` takes, that reads through our sampler."""
    if type(loader) is DataLoader or type(loader).__module__.startswith("torchdata."):
        kind: type = OrderedLoader
    else:
        kind = type(type(loader).__name__, (Ordered, type(loader)), {"__module__": type(loader).__module__})
    rebuilt: Any = object.__new__(kind)
    dataset: Any = loader.dataset
    changed: dict[str, Any] = {}
    if isinstance(batches, ListedBatches):
        dataset = SeededUnits(loader, seed)
    elif gathers(dataset):
        changed = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0}
    else:
        if isinstance(batches, GlobalBatchSampler):
            batches.tag = len(dataset)
        dataset = SeededBatches(dataset, loader.collate_fn, seed)
    changed |= {
        "dataset": dataset,
        "batch_sampler": batches,
        "sampler": batches,
        "batch_size": None,
        "drop_last": False,
        "collate_fn": _as_it_is,
        # Its own: iter() draws a seed, and must not take it from the global generator.
        "generator": torch.Generator().manual_seed(mix(seed) >> 1),
        "_iterator": None,
    }
    rebuilt.__dict__.update({**vars(loader), **changed})
    return rebuilt
