"""Find the largest micro-batch that fits in memory, before a run trains (`trainer.find_micro_batch`).

A trial trains a model of its own under the real strategy, on real batches: two optimizer steps with the smallest
micro-batch that divides a rank's share of the global batch, two with the next larger one, and so on, until memory runs
out or a step needs no accumulation any more. Nothing of the trial is kept, so there is nothing to roll back: model,
optimizer, random numbers and data of the run are built afterwards, exactly as with that `data.micro_batch`.

A micro-batch fits if all ranks have completed its steps. Out of memory, a single process frees the trial and continues.
With several ranks it records the result and exits, and torchrun restarts all of them: the others may be waiting for it
in a collective, and a backward pass that has ended early leaves a process group unusable. Since sizes only grow, this
happens once. Later attempts read the result from the events of the run (`runtime/micro_batch.py`).
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.callbacks import user_callbacks
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore
from trainer.config.batch import BatchPlan
from trainer.config.schema import Config
from trainer.core import host_memory
from trainer.core.errors import UserError
from trainer.runs.events import MicroBatchFound
from trainer.runtime import memory, micro_batch, rng
from trainer.runtime.attempt import Attempt
from trainer.runtime.torch_setup import Group, device_of
from trainer.train import build
from trainer.train.data import Data

_STEPS = 2
"""Optimizer steps with each size: the first step of all creates the optimizer's state."""
_ACCUMULATE = 2
"""Micro-batches of a step: the second one has its activations and the gradients of the first in memory."""
_SHARE_OF_MEMORY = 0.95
"""Of a GPU's memory, or the host's, in the trial: the rest is left for fragmentation, longer samples, validation."""


class TooLarge(Exception):
    """A rank ran out of memory in the trial, and all ranks have to restart."""


def find(config: Config, attempt: Attempt, group: Group | None) -> None:
    """Try the micro-batches and record the largest that fits, unless an earlier attempt has. Collective.

    Args:
        config: The run's configuration.
        attempt: The attempt.
        group: CPU (gloo) group of all ranks; None for one rank.

    Raises:
        TooLarge: Memory ran out on this rank, which is one of several. The result is recorded.
        torch.OutOfMemoryError, RuntimeError, MemoryError: Not even the smallest micro-batch fits.
    """
    if micro_batch.is_found(attempt.directory, attempt.rank, group):
        return
    readers = build.place_in_data(config, attempt.rank).world_size
    trial = _Trial(BatchPlan.of(config.data["batch_size"], 1, readers), attempt, group)
    error: BaseException | None = None
    try:
        with _less_memory(device_of(config, attempt.rank)):
            _train(_config_of(config), trial)
    except (RuntimeError, MemoryError) as caught:
        if not trial.fitting or not memory.is_exhausted(caught):
            raise
        error = caught.with_traceback(None)  # whose frames keep the model and the activations
    largest, failed = trial.fitting[-1], trial.current if error is not None else None
    _record(trial, largest, failed)
    attempt.plan = None
    if error is not None and group is not None:
        raise TooLarge(f"a micro-batch of {failed} is too large for rank {attempt.rank.rank}, {largest} fits")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _record(trial: _Trial, largest: int, failed: int | None) -> None:
    rank = trial.attempt.rank
    if failed is None and not rank.is_first:
        return
    found = MicroBatchFound(
        attempt=rank.attempt,
        rank=rank.rank,
        batch_size=trial.plan.global_batch,
        micro_batch=largest,
        too_large=failed,
    )
    trial.attempt.directory.add_event(found)
    limit = "a rank's whole share" if failed is None else f"{failed} does not fit"
    print(f"micro-batch {largest} fits ({limit})", flush=True)


@dataclass
class _Trial:
    """What is tried, and what has fitted so far."""

    plan: BatchPlan
    """The split with the smallest micro-batch."""
    attempt: Attempt
    group: Group | None
    fitting: list[int] = field(default_factory=list)
    """Micro-batches whose steps all ranks have completed."""
    current: int = 1

    def __post_init__(self) -> None:
        self.sizes = micro_batch.sizes(self.plan)

    def plan_of(self, size: int) -> BatchPlan:
        """Return the split with this micro-batch."""
        return BatchPlan.of(self.plan.global_batch, size, self.plan.world_size)


def _config_of(config: Config) -> Config:
    """Return the configuration of the trial: an epoch over its batches, without validation."""
    trial = copy.copy(config)
    trial.data = {**config.data, "micro_batch": 1}
    trial.trainer = replace(
        config.trainer,
        max_steps=None,
        max_epochs=1,
        min_steps=None,
        min_epochs=None,
        limit_train_batches=None,
        limit_val_batches=0,
        overfit_batches=None,
        val_check_interval=None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        profiler=None,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=0,
    )
    return trial


def _train(config: Config, trial: _Trial) -> None:
    """Build a model and train it with every size, until memory runs out."""
    attempt, group = trial.attempt, trial.group
    rank, path = attempt.rank, attempt.directory.path
    checkpoints = RunCheckpointIO(CheckpointWriter(CheckpointStore(attempt.directory.checkpoints_dir)))
    trainer = build.build_trainer(config, rank, checkpoints, str(path))
    rng.seed_all(config.seed)
    data = build.build_data(config, rank, trainer, group)
    num_steps = _STEPS * len(trial.sizes)
    module = build.build_module(config, data, lambda: num_steps, deferral=build.deferral_of(config, rank))
    build.convert_to_float8(module, config, rank)
    data.set_up(module)
    if not module.automatic_optimization:
        problem = f"trainer.find_micro_batch=true: {type(module).__name__} optimizes manually and splits batches itself"
        raise UserError(problem, "set data.micro_batch")
    if any(isinstance(part, _BatchNorm) for part in module.modules()) and len(trial.sizes) > 1:
        del trial.sizes[0]  # one sample has no variance
    batches = _Batches(data, trial)
    data.owner.train_dataloader = lambda: batches  # type: ignore[method-assign]
    averaging = [one for one in user_callbacks.build(config.callbacks) if isinstance(one, WeightAveraging)]
    build.complete(trainer, [*averaging, _Sizes(trial, device_of(config, rank).type == "cpu")], [])
    trainer.accumulate_grad_batches = _ACCUMULATE if len(trial.sizes) > 1 else 1
    trainer.fit(module, datamodule=data.module)


class _Batches:
    """The train loader of the trial: a few batches of each size, the smallest first."""

    def __init__(self, data: Data, trial: _Trial) -> None:
        self._data, self._trial = data, trial

    def __len__(self) -> int:
        return _STEPS * _ACCUMULATE * len(self._trial.sizes)

    def __iter__(self) -> Iterator[Any]:
        for size in self._trial.sizes:
            loader = self._data.loader_of(self._trial.plan_of(size))
            combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
            wanted = _STEPS * _ACCUMULATE
            batches = [batch for batch, _, _ in itertools.islice(iter(combined), wanted)]
            combined.reset()  # ends the workers
            yield from itertools.islice(itertools.cycle(batches), wanted)


class _Sizes(Callback):
    """Notes which sizes fit. All ranks wait for each other after each size."""

    def __init__(self, trial: _Trial, on_cpu: bool) -> None:
        self._trial = trial
        self._host = _HostMemory(trial.attempt.rank.local_world_size) if on_cpu else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the size that is tried; a rank's whole share is a step of its own, without accumulation."""
        trial, per_size = self._trial, _STEPS * _ACCUMULATE
        if batch_idx % per_size == 0:
            trial.current = trial.sizes[batch_idx // per_size]
            trial.attempt.plan = trial.plan_of(trial.current)
            is_share = trial.current == trial.sizes[-1]
            if is_share and not trainer.strategy.handles_gradient_accumulation:
                trainer.accumulate_grad_batches = 1
            if self._host is not None:
                self._host.check(trial.current)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that the size fits, once all ranks have completed its last step."""
        if (batch_idx + 1) % (_STEPS * _ACCUMULATE):
            return
        if self._trial.group is not None:
            torch.distributed.barrier(self._trial.group)
        if self._host is not None:
            self._host.note(self._trial.current)
        self._trial.fitting.append(self._trial.current)


class _HostMemory:
    """Refuses a size before it fills the memory of the host, by the peaks of the two sizes before it.

    Linux kills a process that does so. It could record nothing, and every attempt would try the same size again.
    """

    def __init__(self, ranks: int) -> None:
        """`ranks` of this node grow at the same time."""
        self._ranks = ranks
        self._peaks: list[tuple[int, int]] = []
        """Size and bytes."""

    def note(self, size: int) -> None:
        """Note the peak of a size whose steps are complete."""
        self._peaks.append((size, host_memory.peak_bytes()))

    def check(self, size: int) -> None:
        """Start a size, which is larger than those before.

        Raises:
            MemoryError: It would not fit.
        """
        available = host_memory.available_bytes()
        if len(self._peaks) >= 2 and available is not None:
            (small, low), (large, high) = self._peaks[-2:]
            peak = high + (high - low) * (size - large) / (large - small)
            needed = self._ranks * (peak - host_memory.resident_bytes())
            if needed > _SHARE_OF_MEMORY * available:
                raise MemoryError(f"{needed / 1e9:.3g} GB more are needed, and {available / 1e9:.3g} GB are free")
        host_memory.reset_peak()


@contextmanager
def _less_memory(device: torch.device) -> Iterator[None]:
    """Limit a GPU's memory in this context, so that what fits leaves a margin."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(_SHARE_OF_MEMORY, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
