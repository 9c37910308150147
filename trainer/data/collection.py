"""Train loaders of any kind and in any collection, each made one that is shared between the ranks and resumes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES, CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.data.loader import Ordered, describe, evaluation, resumable, sized_len
from trainer.data.order import Batches
from trainer.data.ranks import Ranks
from trainer.data.stream import Stream

_log = logging.getLogger(__name__)


def leaves(loaders: Any) -> list[Any]:
    """The loaders of a dict, a list, a `CombinedLoader` or any nesting of them, in Lightning's order."""
    return list(_combined(loaders).flattened)


def length_of(loaders: Any) -> int | None:
    """Micro-batches of an epoch; None where a loader that decides it has no length."""
    combined = _combined(loaders)
    lengths = [sized_len(loader) for loader in combined.flattened]
    count = _SUPPORTED_MODES[combined._mode]["fn"]
    return None if None in lengths else count(lengths)  # type: ignore[arg-type]


def micro_batch_of(loaders: Any) -> int | None:
    """The batch size of the first loader that has one."""
    sizes = [getattr(loader, "batch_size", None) for loader in leaves(loaders)]
    return next((size for size in sizes if isinstance(size, int)), None)


def shared_training(
    loaders: Any,
    plan: BatchPlan,
    ranks: Ranks,
    seed: int,
    given: int | None,
    fewer: Callable[[DataLoader[Any], BatchPlan], DataLoader[Any]] = lambda loader, plan: loader,
    is_shared: bool = False,
) -> Any:
    """`loaders` in the same collection, each of them rebuilt (`loader.resumable`) or a `Stream`.

    A single loader has the micro-batch of `plan`. In a collection each loader's own batch size is the micro-batch of a
    rank, as in Lightning; where `data.batch_size` is `given`, all are cut as it is: their sizes are then global, too.
    `fewer`: cuts a loader to the samples of `trainer.overfit_batches`. `is_shared`: the loaders are left as they are
    (`trainer.use_distributed_sampler=false`).
    """
    combined = _combined(loaders)
    if combined._mode == "sequential":
        raise UserError(
            "train_dataloader: Lightning does not train with CombinedLoader(mode='sequential')",
            "use the mode min_size, max_size or max_size_cycle, or a ConcatDataset in one loader",
        )
    found = list(combined.flattened)
    plans = [plan] if len(found) == 1 else _plans(found, plan, given)

    def shared(loader: Any, own: BatchPlan) -> Any:
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            return loader  # Lightning says what is wrong with it
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            loader = fewer(loader, own)
        if not isinstance(loader, DataLoader) or is_shared:
            return Stream(loader, ranks, seed, describe(loader), is_shared)
        if given is not None:
            loader = _of_size(loader, own.micro_batch)
        return resumable(loader, own, ranks.rank, seed, ranks)

    return _put_back(loaders, combined, [shared(*pair) for pair in zip(found, plans, strict=True)])


def shared_evaluation(loaders: Any, ranks: Ranks) -> Any:
    """`loaders` in the same collection, those that are DataLoaders rebuilt by `loader.evaluation`."""
    combined = _combined(loaders)
    rebuilt = [
        evaluation(loader, ranks.rank, ranks.world_size, ranks=ranks) if isinstance(loader, DataLoader) else loader
        for loader in combined.flattened
    ]
    return _put_back(loaders, combined, rebuilt)


def connect(
    loaders: list[Any], not_trained: Callable[[int], int], epoch_is_over: Callable[[], bool], begins_with: int
) -> None:
    """Tell the rebuilt ones how to ask the Trainer how far it has come, and with which epoch they begin."""
    fetches_ahead = any(sized_len(loader) is None for loader in loaders)
    for number, loader in enumerate(loaders):
        if isinstance(loader, (Ordered, Stream)):
            loader.not_trained = lambda number=number: not_trained(number)  # type: ignore[misc]
            loader.epoch_is_over = epoch_is_over
            loader.begin_with(begins_with)
        if isinstance(loader, Stream):
            loader.fetches_ahead = fetches_ahead


def listen(loader: Any, on_batch: Callable[[int, int, list[Any]], None]) -> None:
    """Call `on_batch` with (epoch, step, ids) of each micro-batch that a rebuilt loader hands out, and of those that
    were fetched ahead of the training."""
    if isinstance(loader, Stream):
        loader.on_batch = on_batch
    elif isinstance(loader, Ordered) and isinstance(loader.batch_sampler, Batches):
        loader.batch_sampler.listen(on_batch, loader.not_trained())


def load_states(loaders: list[Any], states: list[dict[str, Any]]) -> None:
    """Continue where the loaders' `state_dict`s were taken, in this order."""
    ours = [loader for loader in loaders if isinstance(loader, (Ordered, Stream))]
    if len(ours) != len(states):
        _log.warning(
            "the checkpoint knows the positions of %d train loaders, there are %d: they begin the epoch again",
            *(len(states), len(ours)),
        )
        return
    for loader, state in zip(ours, states, strict=True):
        loader.load_state_dict(state)


def _combined(loaders: Any) -> CombinedLoader:
    return loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")


def _put_back(loaders: Any, combined: CombinedLoader, rebuilt: list[Any]) -> Any:
    combined.flattened = rebuilt
    return combined if combined is loaders else combined.iterables


def _plans(loaders: list[Any], plan: BatchPlan, given: int | None) -> list[BatchPlan]:
    sizes = [getattr(loader, "batch_size", None) for loader in loaders]
    known = [size for size in sizes if isinstance(size, int)]
    whole = plan.micro_batch if given is None or not known else given if given in known else known[0]
    plans = []
    for size in sizes:
        size = size if isinstance(size, int) else whole
        if size * plan.micro_batch % whole:
            raise UserError(
                f"train_dataloader: a loader's batch_size={size} does not divide as data.batch_size={given} does",
                f"use sizes that divide by {plan.world_size * plan.accumulate}, or leave data.batch_size out",
            )
        micro = size * plan.micro_batch // whole
        plans.append(replace(plan, global_batch=micro * plan.accumulate * plan.world_size, micro_batch=micro))
    return plans


def _of_size(loader: DataLoader[Any], micro_batch: int) -> DataLoader[Any]:
    """A loader over an IterableDataset with another batch size."""
    if type(loader) is not DataLoader or not isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    changed = copy.copy(loader)
    batch_sampler = BatchSampler(loader.sampler, micro_batch, loader.drop_last)
    changed.__dict__.update(batch_size=micro_batch, batch_sampler=batch_sampler)
    return changed
