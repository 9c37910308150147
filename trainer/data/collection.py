"""Train loaders of any kind and in any collection, each sharded over the ranks and made resumable."""

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
    """Return the loaders of a dict, a list, a `CombinedLoader` or any nesting of them, in Lightning's order."""
    return list(_combined(loaders).flattened)


def length_of(loaders: Any) -> int | None:
    """Return the number of micro-batches in an epoch; None if a loader that decides it has no length."""
    combined = _combined(loaders)
    lengths = [sized_len(loader) for loader in combined.flattened]
    count = _SUPPORTED_MODES[combined._mode]["fn"]
    return None if None in lengths else count(lengths)  # type: ignore[arg-type]


def micro_batch_of(loaders: Any) -> int | None:
    """Return the batch size of the first loader that has one."""
    sizes = [getattr(loader, "batch_size", None) for loader in leaves(loaders)]
    return next((size for size in sizes if isinstance(size, int)), None)


def shared_training(
    loaders: Any,
    plan: BatchPlan,
    ranks: Ranks,
    seed: int,
    *,
    given: int | None,
    fewer: Callable[[DataLoader[Any], BatchPlan], DataLoader[Any]] = lambda loader, plan: loader,
    is_shared: bool = False,
    first_epoch: int = 0,
) -> Any:
    """Return `loaders` in the same collection, each of them rebuilt (`loader.resumable`) or wrapped in a `Stream`.

    A single loader has the micro-batch of `plan`. In a collection each loader's own batch size is the micro-batch of a
    rank, as in Lightning. If `data.batch_size` is given, the batch sizes of all loaders are scaled by the same factor:
    they are then global, too.

    Args:
        loaders: What `train_dataloader` returned.
        plan: How the global batch is split.
        ranks: This rank's position among the data-parallel ranks.
        seed: Seed of the run.
        given: `data.batch_size`; None: not set.
        fewer: Cuts a loader to the samples of `trainer.overfit_batches`.
        is_shared: Leave the order of the loaders unchanged (`trainer.use_distributed_sampler=false`).
        first_epoch: The epoch in which the loaders were created.
    """
    combined = _combined(loaders)
    if combined._mode == "sequential":
        raise UserError(
            "train_dataloader: Lightning does not train with CombinedLoader(mode='sequential')",
            "use mode='min_size', 'max_size' or 'max_size_cycle', or a ConcatDataset in one loader",
        )
    flat = list(combined.flattened)
    plans = [plan] if len(flat) == 1 else _plans(flat, plan, given)

    def shared(loader: Any, own: BatchPlan) -> Any:
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            return loader  # Lightning raises the error
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            loader = fewer(loader, own)
        if not isinstance(loader, DataLoader) or is_shared:
            return Stream(loader, ranks, seed, describe(loader), is_shared)
        if given is not None:
            loader = _of_size(loader, own.micro_batch)
        return resumable(loader, own, ranks.rank, seed, ranks=ranks, first_epoch=first_epoch)

    return _put_back(loaders, combined, [shared(*pair) for pair in zip(flat, plans, strict=True)])


def shared_evaluation(loaders: Any, ranks: Ranks) -> Any:
    """Return `loaders` in the same collection, with each DataLoader rebuilt by `loader.evaluation`."""
    combined = _combined(loaders)
    rebuilt = [
        evaluation(loader, ranks.rank, ranks.world_size, ranks=ranks) if isinstance(loader, DataLoader) else loader
        for loader in combined.flattened
    ]
    return _put_back(loaders, combined, rebuilt)


def connect(
    loaders: list[Any], not_trained: Callable[[int], int], epoch_is_complete: Callable[[], bool], begins_with: int
) -> None:
    """Connect the rebuilt loaders to the Trainer.

    Args:
        loaders: The loaders in Lightning's order.
        not_trained: Number of a loader to its batches that were handed out but not trained on yet.
        epoch_is_complete: Whether the training's epoch is complete.
        begins_with: The epoch that the loaders start with.
    """
    fetches_ahead = any(sized_len(loader) is None for loader in loaders)
    for number, loader in enumerate(loaders):
        if isinstance(loader, (Ordered, Stream)):
            loader.not_trained = lambda number=number: not_trained(number)  # type: ignore[misc]
            loader.epoch_is_complete = epoch_is_complete
            loader.begin_with(begins_with)
        if isinstance(loader, Stream):
            loader.fetches_ahead = fetches_ahead


def listen(loader: Any, on_batch: Callable[[int, int, list[Any]], None]) -> None:
    """Call `on_batch(epoch, step, ids)` for each micro-batch that a rebuilt loader hands out.

    It is also called for those that were fetched ahead of the training.
    """
    if isinstance(loader, Stream):
        loader.on_batch = on_batch
    elif isinstance(loader, Ordered) and isinstance(loader.batch_sampler, Batches):
        loader.batch_sampler.listen(on_batch, loader.not_trained())


def load_states(loaders: list[Any], states: list[dict[str, Any]]) -> None:
    """Restore the positions of the loaders from their `state_dict`s, in this order."""
    resumable_loaders = [loader for loader in loaders if isinstance(loader, (Ordered, Stream))]
    if len(resumable_loaders) != len(states):
        _log.warning(
            "the checkpoint has the positions of %d train loaders, but there are %d: they restart the epoch",
            *(len(states), len(resumable_loaders)),
        )
        return
    for loader, state in zip(resumable_loaders, states, strict=True):
        loader.load_state_dict(state)


def _combined(loaders: Any) -> CombinedLoader:
    return loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")


def _put_back(loaders: Any, combined: CombinedLoader, rebuilt: list[Any]) -> Any:
    combined.flattened = rebuilt
    return combined if combined is loaders else combined.iterables


def _plans(loaders: list[Any], plan: BatchPlan, given: int | None) -> list[BatchPlan]:
    sizes = [getattr(loader, "batch_size", None) for loader in loaders]
    known = [size for size in sizes if isinstance(size, int)]
    reference = plan.micro_batch if given is None or not known else given if given in known else known[0]
    plans = []
    for size in sizes:
        size = size if isinstance(size, int) else reference
        if size * plan.micro_batch % reference:
            raise UserError(
                f"train_dataloader: a loader's batch_size={size} cannot be scaled to data.batch_size={given}",
                f"use batch sizes that are multiples of {plan.world_size * plan.accumulate}, or omit data.batch_size",
            )
        micro_batch = size * plan.micro_batch // reference
        plans.append(
            replace(plan, global_batch=micro_batch * plan.accumulate * plan.world_size, micro_batch=micro_batch)
        )
    return plans


def _of_size(loader: DataLoader[Any], micro_batch: int) -> DataLoader[Any]:
    """Return a loader over an IterableDataset with another batch size."""
    if type(loader) is not DataLoader or not isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    changed = copy.copy(loader)
    batch_sampler = BatchSampler(loader.sampler, micro_batch, loader.drop_last)
    changed.__dict__.update(batch_size=micro_batch, batch_sampler=batch_sampler)
    return changed
