"""The data of a rank: the user's data module, or the loaders of the LightningModule itself, set up once per stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden

from trainer.config.batch import BatchPlan
from trainer.config.instantiate import accepts, instantiate, locate
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.data.collection import (
    connect,
    leaves,
    length_of,
    load_states,
    micro_batch_of,
    shared_evaluation,
    shared_training,
)
from trainer.data.loader import Ordered, describe
from trainer.data.randomness import Generators, generators_untouched, seed_sample
from trainer.data.ranks import Ranks, Shares
from trainer.runtime.process import Rank
from trainer.train.trainer_arguments import fewer_samples, limit_epoch

Group = torch.distributed.ProcessGroup
READ_BY_TRAINER = ("batch_size", "micro_batch", "num_workers")
"""Keys of `data` that are passed to the data module only if its signature has them."""
EVALUATIONS = ("val_dataloader", "test_dataloader", "predict_dataloader")
LOADERS = ("train_dataloader", *EVALUATIONS)


class Data:
    """The data module and its loaders, rebuilt so that they are sharded and resume exactly.

    `prepare_data` (once per node, or once) and `setup("fit")` are called here and not again by Lightning: their results
    are needed to build the model and the schedule that Lightning gets. They see `self.trainer`, the Trainer that will
    train. Both hooks, and the construction of each loader, draw random numbers from the same state on every rank and in
    every attempt, independent of the model's.
    """

    def __init__(self, config: Config, place: Rank, trainer: Trainer, group: Group | None = None) -> None:
        """Instantiate the data module.

        Args:
            config: The run's configuration.
            place: Data parallel rank and world size: ranks that read different samples.
            trainer: The Trainer that will train.
            group: CPU (gloo) group of all ranks; None for one rank.
        """
        self.config, self.place, self.trainer = config, place, trainer
        self.ranks = Ranks(place.rank, place.world_size, group)
        self.module: LightningDataModule | None = None
        """The data module; None: the LightningModule has the loaders."""
        if config.data.get("_target_") is not None:
            target = locate(config.data["_target_"], "data._target_")
            node = {
                key: value
                for key, value in config.data.items()
                if key not in READ_BY_TRAINER or (value is not None and accepts(target, key))
            }
            self.module = instantiate(node, where="data")
        self._generators = Generators()
        self._owner: LightningDataModule | LightningModule | None = None
        self._instance_methods: dict[str, Any] = {}
        """Loader methods that were set on the owner itself, not on its class."""
        self._facts: dict[str, Any] | None = None
        self._plan: BatchPlan | None = None
        self._users_loaders: tuple[int, Any] | None = None
        """Epoch for which the user's `train_dataloader` was called, and what it returned."""
        self._train_loader: Any = None
        """The rebuilt train loader, or collection of loaders."""
        self._was_requested = False
        """Whether Lightning has requested the train loader before."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the data after `setup("fit")` (`num_classes`, `vocab_size`, ...), for arguments of the model."""
        if self._facts is None:
            if not hasattr(self.module, "facts"):
                return {}
            self.set_up()
            self._facts = self.module.facts()  # type: ignore[union-attr]
        return self._facts

    @property
    def owner(self) -> LightningDataModule | LightningModule:
        """The object that has the loaders, once it is set up."""
        assert self._owner is not None
        return self._owner

    def default_task(self) -> str:
        """Return the import path of the task for a network that is not a LightningModule."""
        task = getattr(self.module, "default_task", None)
        if not isinstance(task, str):
            problem = "the model is not a LightningModule, and the data names no task for it"
            raise UserError(problem, "choose a task: task._target_=..., or give the data module a default_task")
        return task

    @property
    def plan(self) -> BatchPlan:
        """Split of the global batch: from `data.batch_size`, else from the loader's batch size, as in Lightning."""
        if self._plan is None:
            batch_size, micro_batch = self.config.data.get("batch_size"), self.config.data.get("micro_batch")
            if batch_size is None:
                loaders = self._train_loaders(self.epoch_of_loaders())
                micro_batch = micro_batch or micro_batch_of(loaders) or 1
                accumulate = self.config.trainer.accumulate_grad_batches or 1
                batch_size = micro_batch * self.place.world_size * accumulate
            plan = BatchPlan.of(batch_size, micro_batch, self.place.world_size)
            # DeepSpeed counts micro-batches across epochs: a shorter step would shift all steps that follow.
            counts_on = self.trainer.strategy.handles_gradient_accumulation and plan.accumulate > 1
            self._plan = replace(plan, whole_steps=counts_on)
        return self._plan

    def set_up(self, module: LightningModule | None = None) -> None:
        """Prepare the data and set it up for "fit", once. `module`: the module to be trained, if already built."""
        if self._owner is not None:
            return
        trainer = self.trainer
        if module is not None:
            trainer.strategy.connect(module)
            module.trainer = trainer
        if self.module is not None:
            trainer.datamodule = self.module  # type: ignore[attr-defined]
            self.module.trainer = trainer
        owner = self._owner = self.module or self._require_loaders(module)
        state = trainer.state.fn, trainer.state.status, trainer.state.stage
        trainer.state.fn, trainer.state.status, trainer.training = TrainerFn.FITTING, TrainerStatus.RUNNING, True
        with generators_untouched():
            self._prepare(owner)
            generators = self._generators
            generators.restore()
            self._call("setup", stage=TrainerFn.FITTING)
            self._generators = Generators()
        trainer.state.fn, trainer.state.status, trainer.state.stage = state
        _skip_once(owner, "setup", generators, stage=TrainerFn.FITTING)
        self._instance_methods = {name: vars(owner)[name] for name in LOADERS if name in vars(owner)}
        self._users_train_dataloader = owner.train_dataloader
        owner.train_dataloader = self._train_dataloader  # type: ignore[method-assign]
        for name in EVALUATIONS:
            if is_overridden(name, owner):
                setattr(owner, name, self._sharded(getattr(owner, name)))
        _restore_existing_loaders(trainer, self)

    def _require_loaders(self, module: LightningModule | None) -> LightningModule:
        if module is not None and is_overridden("train_dataloader", module):
            return module
        name = "the model" if module is None else type(module).__name__
        raise UserError(f"data=none: {name} has no train_dataloader of its own", "choose data: data=...")

    def _call(self, hook: str, **arguments: Any) -> Any:
        if self.module is not None:
            return call._call_lightning_datamodule_hook(self.trainer, hook, **arguments)
        return call._call_lightning_module_hook(self.trainer, hook, **arguments)

    def _prepare(self, owner: LightningDataModule | LightningModule) -> None:
        trainer = self.trainer
        if not is_overridden("prepare_data", owner):
            return
        with _InfiniteBarrier():  # the other ranks wait for as long as a download takes
            if trainer.local_rank == 0 and (owner.prepare_data_per_node or trainer.node_rank == 0):
                self._call("prepare_data")
        _skip_once(owner, "prepare_data")

    def epoch_of_loaders(self) -> int:
        """Return the epoch in which the current loaders were created (`reload_dataloaders_every_n_epochs`)."""
        every = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        return self.trainer.current_epoch // every * every if every else 0

    def _call_users_method(self, method: Callable[[], Any], epoch: int) -> Any:
        """Call the user's loader method. The random numbers that it draws are a function of seed and epoch."""
        with generators_untouched(), self._users_methods():
            self._generators.restore()
            if epoch:
                seed_sample(self.config.seed, epoch, 0)
            return method()

    @contextmanager
    def _users_methods(self) -> Iterator[None]:
        """Restore the user's loader methods in this context: `val_dataloader` may call `self.train_dataloader()`."""
        names = vars(self._owner)
        replaced = {name: names.pop(name) for name in LOADERS if name in names}
        names.update(self._instance_methods)
        try:
            yield
        finally:
            names.update(replaced)

    def _train_loaders(self, epoch: int) -> Any:
        if self._users_loaders is None or self._users_loaders[0] != epoch:
            loaders = self._call_users_method(self._users_train_dataloader, epoch)
            self._users_loaders, self._train_loader = (epoch, loaders), None
        return self._users_loaders[1]

    def training_loader(self) -> Any:
        """Return the rebuilt train loader, or the collection of them."""
        options = self.config.trainer
        loaders = self._train_loaders(self.epoch_of_loaders())
        if self._train_loader is None:
            self._train_loader = shared_training(
                loaders,
                self.plan,
                self.ranks,
                self.config.seed,
                given=self.config.data.get("batch_size"),
                fewer=lambda loader, plan: fewer_samples(loader, options, plan),
                is_shared=not options.use_distributed_sampler,
                first_epoch=self.epoch_of_loaders(),
            )
            connect(
                leaves(self._train_loader), self._num_prefetched, self._epoch_is_complete, self.trainer.current_epoch
            )
        limit_epoch(self._train_loader, options, self.plan, self.trainer)
        return self._train_loader

    def loader_of(self, plan: BatchPlan) -> Any:
        """Return a new train loader with another split of the global batch, at the beginning of an epoch."""
        loaders = self._call_users_method(self._users_train_dataloader, 0)
        is_shared = not self.config.trainer.use_distributed_sampler
        return shared_training(
            loaders, plan, self.ranks, self.config.seed, given=plan.global_batch, is_shared=is_shared
        )

    def _train_dataloader(self) -> Any:
        """Answer Lightning: the existing loaders first, later new ones (`reload_dataloaders_every_n_epochs`)."""
        if self._was_requested:
            self._users_loaders = None
            if self.config.data.get("batch_size") is None:
                self._plan = None
        self._was_requested = True
        loaders = self.training_loader()
        self.restore(leaves(loaders))
        return loaders

    def restore(self, loaders: list[Any]) -> None:
        """Load the loader states of the checkpoint that Lightning has read, once."""
        loop = self.trainer.fit_loop
        if loop._combined_loader_states_to_load:
            load_states(loaders, loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []

    def _num_prefetched(self, number: int) -> int:
        """Return the batches of loader `number` that Lightning has fetched and not trained on yet."""
        fetcher = self.trainer.fit_loop._data_fetcher
        ahead = getattr(fetcher, "batches", None)
        if fetcher is None or not ahead:
            return 0
        spec = fetcher.combined_loader._spec
        return sum(spec.flatten_up_to(batch)[number] is not None for batch, _, _ in ahead)

    def _epoch_is_complete(self) -> bool:
        """Return whether the next training batch is the first of an epoch."""
        loop = self.trainer.fit_loop.epoch_loop
        progress = loop.batch_progress
        return progress.current.ready == 0 or progress.is_last_batch or loop._num_ready_batches_reached()

    def _sharded(self, original: Callable[[], Any]) -> Callable[[], Any]:
        """Return a loader method that shards evaluation loaders: each sample once over all ranks."""

        def dataloader() -> Any:
            loaders = self._call_users_method(original, self.epoch_of_loaders())
            if not self.config.trainer.use_distributed_sampler:
                return loaders
            return shared_evaluation(loaders, self.ranks)

        return dataloader

    def require_shared(self, loader: Any) -> None:
        """Raise UserError if a loader gives every rank the same samples: each rank would write their predictions."""
        if self.ranks.world_size == 1 or isinstance(loader, Ordered):
            return
        if self.ranks.compare(next(iter(loader), None), describe(loader)) is Shares.SAME:
            raise UserError(
                f"{describe(loader)} gives the same samples to each of {self.ranks.world_size} ranks",
                "predict with one rank: add --ranks 1",
            )

    def steps_per_epoch(self) -> int | None:
        """Return the optimizer steps in an epoch; None if the loader has no length."""
        length = length_of(self.training_loader())
        return None if length is None else math.ceil(length / self.plan.accumulate)


def _restore_existing_loaders(trainer: Trainer, data: Data) -> None:
    """Restore train loaders that were created before Lightning has read the checkpoint.

    `trainer.estimated_stepping_batches` in `configure_optimizers` creates them. Lightning then does not restore them,
    and reads from the first epoch. With `reload_dataloaders_every_n_epochs` it counts from the resume.
    """
    loop = trainer.fit_loop
    set_up_data = loop.setup_data

    def setup_data() -> None:
        combined = loop._combined_loader
        if combined is not None and loop._combined_loader_states_to_load and not loop._should_reload_train_dl:
            data.restore(combined.flattened)
            assert loop._data_fetcher is not None
            iter(loop._data_fetcher)
        set_up_data()
        if loop._combined_loader is not combined:
            loop._last_train_dl_reload_epoch = data.epoch_of_loaders()

    loop.setup_data = setup_data  # type: ignore[method-assign]


def _skip_once(owner: Any, name: str, generators: Generators | None = None, **arguments: Any) -> None:
    """Skip the next call of this method with these arguments: Lightning's call of a hook that has run already.

    Other calls draw their random numbers from the state `generators`: a `setup` that splits the data at every stage
    then splits it for an evaluation as for training.
    """
    original = getattr(owner, name)
    skipped = False

    def called(*positional: Any, **given: Any) -> Any:
        nonlocal skipped
        if not (skipped or positional or given != arguments):
            skipped = True
            return None
        if generators is None:
            return original(*positional, **given)
        with generators_untouched():
            generators.restore()
            return original(*positional, **given)

    setattr(owner, name, called)
