"""DataLoaders rebuilt to resume exactly and to give the same global batches at any world size."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.data.order import Batches, EvaluationBatches, GlobalBatchSampler, ListedBatches
from trainer.data.randomness import generators_untouched, mix, seed_sample
from trainer.data.ranks import Ranks, Shares
from trainer.data.seeded import SeededBatches, SeededUnits, lookup_order, supports_gather
from trainer.data.stream import Stream, is_stateful

_log = logging.getLogger(__name__)


def _identity(batch: Any) -> Any:
    return batch


class Ordered:
    """A mixin for DataLoaders over one of our samplers; it reports each batch that it hands out to the sampler.

    `_rebuild` puts it before the user's loader class: its collating, worker functions and `__iter__` stay.
    """

    batch_sampler: Batches | EvaluationBatches
    _reads = False
    """Whether an iterator is being created, which reads through `SeededBatches` or `SeededUnits`."""
    pin_memory: bool
    not_trained: Callable[[], int] = int
    """Returns the number of batches handed out but not trained on yet (`stream.Stream.not_trained`)."""
    epoch_is_complete: Callable[[], bool] | None = None
    """Returns whether the training's epoch is complete; None: use this loader's epoch."""

    @property
    def dataset(self) -> Any:
        """The user's dataset: a module's `setup` may read the shape of a sample from it."""
        given = vars(self)["dataset"]
        return given.dataset if isinstance(given, (SeededBatches, SeededUnits)) and not self._reads else given

    def _get_iterator(self) -> Any:
        self._reads = True
        try:
            return super()._get_iterator()  # type: ignore[misc]
        finally:
            self._reads = False

    def __iter__(self) -> Iterator[Any]:
        sampler = self.batch_sampler
        batches = self._gathered() if supports_gather(self.dataset) else super().__iter__()  # type: ignore[misc]
        if isinstance(sampler, EvaluationBatches):
            yield from batches
            return
        first = True
        for batch in batches:
            if first and not sampler.num_requested:
                raise UserError(
                    f"{type(self).__name__}.__iter__ does not use its batch_sampler: it cannot be sharded",
                    "call super().__iter__() in it, or shard it yourself: trainer.use_distributed_sampler=false",
                )
            first = False
            sampler.delivered()
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def state_dict(self) -> dict[str, int]:
        """Return the position in micro-batches; Lightning saves it with its loops and restores it on resume."""
        sampler = self.batch_sampler
        assert isinstance(sampler, Batches)
        num_untrained = self.not_trained()
        is_over = sampler.position[1] == 0 if self.epoch_is_complete is None else self.epoch_is_complete()
        return sampler.state(num_untrained, is_over)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position."""
        assert isinstance(self.batch_sampler, Batches)
        if "epoch" in state:
            self.batch_sampler.load(state)
        else:
            _log.warning("%s: the checkpoint holds the state of a different loader type", type(self).__name__)

    def begin_with(self, epoch: int) -> None:
        """Start the next iteration at the beginning of `epoch`."""
        assert isinstance(self.batch_sampler, Batches)
        self.batch_sampler.seek(epoch, 0)

    def _gathered(self) -> Iterator[Any]:
        gather = self.dataset.gather
        pin = self.pin_memory and torch.cuda.is_available()
        for epoch, ids in self.batch_sampler.rows():  # type: ignore[union-attr]
            batch = gather(ids, epoch)
            yield tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch) if pin else batch


class OrderedLoader(Ordered, DataLoader[Any]):  # type: ignore[misc,override]
    """Replaces a plain DataLoader."""


def resumable(
    loader: DataLoader[Any],
    plan: BatchPlan,
    rank: int,
    seed: int,
    *,
    ranks: Ranks | None = None,
    first_epoch: int = 0,
) -> DataLoader[Any] | Stream:
    """Return `loader` with one of our samplers as its `batch_sampler`; `plan` replaces its batch size.

    A custom sampler keeps its order: it is drawn once per epoch on every rank with generators seeded by (seed, epoch),
    and sharded if it is the same on all ranks. If it differs, each rank already has its share. The same holds for the
    batches of a batch sampler, and for `batch_size=None`. A loader whose order cannot be taken over becomes a `Stream`:
    one with an IterableDataset, with a sampler without a length, or with its own `state_dict`.

    Args:
        loader: The user's loader.
        plan: How the global batch is split.
        rank: Data-parallel rank.
        seed: Seed of the run.
        ranks: Compares the data of the ranks; None: a single process.
        first_epoch: The epoch in which the loader was created.

    Raises:
        UserError: There are fewer samples than a global batch, or the ranks of a tensor parallel group differ.
    """
    ranks = ranks or Ranks(rank, plan.world_size)
    name = describe(loader)
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if _is_endless(loader):
        loader, sampler = _with_end(loader), sampler.sampler  # type: ignore[union-attr]
    if _keeps_its_own_order(loader) or sized_len(sampler) is None:
        return Stream(loader, ranks, seed, name)
    if type(sampler) is not BatchSampler:
        drawn = _draws(sampler, seed, first_epoch)
        return _rebuild(loader, _listed_batches(drawn, ranks, plan, name, first_epoch), seed)
    inner = sampler.sampler
    shuffle = _shuffles(inner)
    if shuffle is not None:
        samples: int = len(getattr(inner, "data_source", loader.dataset))  # type: ignore[arg-type]
        lookup = lookup_order(loader.dataset, seed) if shuffle else None
        batches: Batches = GlobalBatchSampler(
            samples, plan, rank, seed, shuffle, lookup=lookup, drop_last=sampler.drop_last
        )
        return _rebuild(loader, batches, seed)
    if sized_len(inner) is None:
        return Stream(loader, ranks, seed, name)
    draw = _draws(inner, seed, first_epoch)
    indices = _as_integers(draw(first_epoch))
    if indices is None:
        in_batches = _in_batches(draw, plan.micro_batch)
        return _rebuild(loader, _listed_batches(in_batches, ranks, plan, name, first_epoch), seed)
    first = first_epoch, indices
    batches = _custom_order(first, draw, plan, ranks, seed=seed, name=name, drop_last=sampler.drop_last)
    return _rebuild(loader, batches, seed)


def evaluation(
    loader: DataLoader[Any], rank: int, world_size: int, seed: int = 0, ranks: Ranks | None = None
) -> DataLoader[Any]:
    """Return `loader` changed so that each sample is read once over all ranks; see `EvaluationBatches`.

    The loader's batch size stays that of a rank. Shuffling cannot change a sum over all samples, so there is none; a
    custom sampler selects the samples. A loader without an order of samples is returned unchanged.

    Args:
        loader: The user's loader.
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
        seed: Seed of the run.
        ranks: Compares the data of the ranks; None: a single process.
    """
    ranks = ranks or Ranks(rank, world_size)
    sampler = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or type(sampler) is not BatchSampler:
        if world_size > 1 and rank == 0:
            _log.warning("%s: not sharded; every rank must read only its own share", describe(loader))
        return loader
    order = None
    if _shuffles(sampler.sampler) is None:
        if sized_len(sampler.sampler) is None:
            return loader
        indices = _as_integers(_draws(sampler.sampler, seed)(0))
        if ranks.compare(indices, describe(loader)) is Shares.OWN or indices is None:
            return loader
        order = torch.tensor(indices)
    samples = len(loader.dataset) if order is None else len(order)  # type: ignore[arg-type]
    batches = EvaluationBatches(samples, loader.batch_size or 1, rank, world_size)
    batches.order = order
    return _rebuild(loader, batches, seed)


def first_samples(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """Return `loader` over the first `count` samples of its dataset, unshuffled.

    A model must be able to memorise so few, or something is wrong with it, its loss or its optimizer.
    """
    samples = range(min(count, len(loader.dataset)))  # type: ignore[arg-type]
    subset = Subset(loader.dataset, samples)
    return DataLoader(subset, loader.batch_size, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory)


def describe(loader: Any) -> str:
    """Return a name for messages, such as `Loader over Rows`."""
    dataset = getattr(loader, "dataset", None)
    kind = "train_dataloader" if isinstance(loader, (list, tuple)) else type(loader).__name__
    return kind if dataset is None else f"{kind} over {type(dataset).__name__}"


def sized_len(iterable: Any) -> int | None:
    """Return the length of an iterable; None if it has none."""
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return None


def _keeps_its_own_order(loader: DataLoader[Any]) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return True
    if not is_stateful(loader):
        return False
    # torchdata's loader over an ordinary dataset and sampler: our position contains all that its state would.
    known = type(loader).__module__.startswith("torchdata.")
    own_sampler = type(loader.batch_sampler) is not BatchSampler or _shuffles(loader.batch_sampler.sampler) is None
    return not known or own_sampler or is_stateful(loader.dataset)


def _is_endless(loader: DataLoader[Any]) -> bool:
    """Return whether the loader keeps its workers by an endless batch sampler, from which `__iter__` takes one epoch.

    The loaders of timm and ultralytics do so.
    """
    batches = loader.batch_sampler
    inner = getattr(batches, "sampler", None)
    return (
        sized_len(batches) is None and type(inner) is BatchSampler and type(loader).__iter__ is not DataLoader.__iter__
    )


def _with_end(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return an ordinary DataLoader with persistent workers."""
    plain: Any = object.__new__(DataLoader)
    inner = loader.batch_sampler.sampler  # type: ignore[union-attr]
    changed = {"batch_sampler": inner, "persistent_workers": loader.num_workers > 0, "_iterator": None}
    plain.__dict__.update({**vars(loader), **changed})
    return plain  # type: ignore[no-any-return]


def _shuffles(sampler: Any) -> bool | None:
    """Return whether one of torch's samplers shuffles.

    None: any other sampler, such as one with weights, a subset or replacement, or a user-defined one.
    """
    if type(sampler) is DistributedSampler:
        return sampler.shuffle
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return True
    return False if type(sampler) is SequentialSampler else None


def _draws(sampler: Any, seed: int, first_epoch: int = 0) -> Callable[[int], list[Any]]:
    """Return a function of the epoch that draws all of `sampler` with every generator seeded by (seed, epoch).

    A user's sampler may keep a generator or a counter from one epoch to the next. So each epoch is drawn once, after
    those before it from `first_epoch` on, which a resume draws again. One of torch's, or one with `set_epoch`, is told
    the epoch instead.
    """
    samplers: Any = (sampler, getattr(sampler, "sampler", None))
    last: tuple[int, list[Any]] = first_epoch - 1, []

    def drawn(epoch: int) -> list[Any]:
        for one in samplers:
            if callable(getattr(one, "set_epoch", None)):
                one.set_epoch(epoch)
            generator = getattr(one, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(mix(seed, epoch) >> 1)
        with generators_untouched():
            seed_sample(seed, epoch, 0)
            return list(itertools.islice(sampler, len(sampler)))

    def drawn_in_turn(epoch: int) -> list[Any]:
        nonlocal last
        if epoch != last[0]:
            for one in range(last[0] + 1 if epoch > last[0] else epoch, epoch + 1):
                last = one, drawn(one)
        return last[1]

    return drawn_in_turn if any(map(_lives_on, samplers)) else drawn


def _lives_on(sampler: Any) -> bool:
    """Return whether a sampler may give other samples in its second epoch for having been read in the first."""
    return sampler is not None and not (
        type(sampler).__module__.startswith("torch.") or callable(getattr(sampler, "set_epoch", None))
    )


def _as_integers(indices: list[Any]) -> list[int] | None:
    """Convert indices, including those of NumPy and torch, to Python integers; None for anything else."""
    try:
        return [index(one) for one in indices]
    except TypeError:
        return None


def _custom_order(
    first: tuple[int, list[int]],
    draw: Callable[[int], list[Any]],
    plan: BatchPlan,
    ranks: Ranks,
    *,
    seed: int,
    name: str,
    drop_last: bool,
) -> GlobalBatchSampler:
    """Return a sampler that follows the order of a custom sampler; `first`: an epoch and its indices."""
    first_epoch, indices = first

    def order(epoch: int) -> torch.Tensor:
        return torch.tensor(indices if epoch == first_epoch else _as_integers(draw(epoch)))

    if ranks.compare(indices, name) is Shares.SAME:
        return GlobalBatchSampler(len(indices), plan, ranks.rank, seed, order=order, drop_last=drop_last)
    _warn_own_samples(name, ranks)
    draw = _require_count(draw, len(indices), name)
    rank_plan = replace(plan, global_batch=plan.micro_batch * plan.accumulate, world_size=1)
    fewest = ranks.minimum(len(indices))
    return GlobalBatchSampler(fewest or 0, rank_plan, 0, seed, order=order, drop_last=drop_last)


def _listed_batches(
    draw: Callable[[int], list[Any]], ranks: Ranks, plan: BatchPlan, name: str, first_epoch: int
) -> ListedBatches:
    """Deal whole batches of a custom order to the ranks in turn; if the ranks differ, keep this rank's own."""
    first = draw(first_epoch)
    if ranks.compare(first, name) is Shares.SAME:
        return ListedBatches(draw, ranks.rank, ranks.world_size, plan.accumulate, first_epoch)
    _warn_own_samples(name, ranks)
    fewest = ranks.minimum(len(first))
    draw = _require_count(draw, fewest or 0, name)
    return ListedBatches(lambda epoch: draw(epoch)[:fewest], 0, 1, plan.accumulate, first_epoch)


def _require_count(draw: Callable[[int], list[Any]], count: int, name: str) -> Callable[[int], list[Any]]:
    """Return `draw` with a check that no epoch gives fewer samples than the first: other ranks would wait forever."""

    def require_count(epoch: int) -> list[Any]:
        samples = draw(epoch)
        if len(samples) < count:
            raise UserError(
                f"{name}: its sampler gives this rank {len(samples)} in epoch {epoch}, and {count} in the first epoch",
                "give each rank the same number in every epoch",
            )
        return samples

    return require_count


def _warn_own_samples(name: str, ranks: Ranks) -> None:
    if ranks.rank == 0:
        _log.warning("%s: its sampler gives each rank different samples; they are not sharded again", name)


def _in_batches(draw: Callable[[int], list[Any]], size: int) -> Callable[[int], list[Any]]:
    """Cut what a sampler gives into batches of `size`, without an incomplete last one."""

    def listed(epoch: int) -> list[Any]:
        indices = draw(epoch)
        return [indices[begin : begin + size] for begin in range(0, len(indices) - size + 1, size)]

    return listed


def _rebuild(loader: DataLoader[Any], batches: Batches | EvaluationBatches, seed: int) -> DataLoader[Any]:
    """Copy the user's loader, whatever its `__init__` takes, and let it read through our sampler."""
    if type(loader) is DataLoader or type(loader).__module__.startswith("torchdata."):
        kind: type = OrderedLoader
    else:
        kind = type(type(loader).__name__, (Ordered, type(loader)), {"__module__": type(loader).__module__})
    rebuilt: Any = object.__new__(kind)
    dataset: Any = loader.dataset
    changed: dict[str, Any] = {}
    if isinstance(batches, ListedBatches):
        dataset = SeededUnits(loader, seed)
    elif supports_gather(dataset):
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
        "collate_fn": _identity,
        # A separate generator: iter() draws a seed, which must not come from the global generator.
        "generator": torch.Generator().manual_seed(mix(seed) >> 1),
        "_iterator": None,
    }
    rebuilt.__dict__.update({**vars(loader), **changed})
    return rebuilt  # type: ignore[no-any-return]
