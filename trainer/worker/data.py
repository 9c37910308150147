"""The data of a rank: the user's data module, or the loaders of the LightningModule itself, set up once a stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _InfiniteBarrier
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from trainer.config.batch import BatchPlan
from trainer.config.build import accepts, instantiate, locate
from trainer.config.schema import Config
from trainer.data.loader import evaluation, resumable
from trainer.data.randomness import Generators, generators_untouched
from trainer.worker.process import Rank
from trainer.worker.trainer_arguments import fewer_samples, limit_epoch

READ_BY_TRAINER = ("batch_size", "micro_batch", "num_workers")
"""Keys of `data` that are handed to the module only where its signature names them."""
EVALUATIONS = ("val_dataloader", "test_dataloader", "predict_dataloader")


class Data:
    """What is trained on, and its loaders, rebuilt so that they are sharded and resume exactly.

    `prepare_data` (once a node, or once) and `setup("fit")` are called here and not again by Lightning: what they
    make is needed to build the model and the schedule that Lightning is given. They see `self.trainer`, the Trainer
    that will train. Both, and the making of each loader, draw their random numbers from the same state on every rank
    and in every attempt, apart from those of the model.
    """

    def __init__(
        self,
        config: Config,
        place: Rank,
        trainer: Trainer,
    ) -> None:
        """Instantiate the data module. `place`: this rank among those that read different samples."""
        self.config, self.place, self.trainer = config, place, trainer
        target = locate(config.data["_target_"], "data._target_")
        node = {
            key: value
            for key, value in config.data.items()
            if key not in READ_BY_TRAINER or (value is not None and accepts(target, key))
        }
        self.module: LightningDataModule = instantiate(node, where="data")
        self._generators = Generators()
        self._facts: dict[str, Any] | None = None
        self._plan: BatchPlan | None = None
        self._train: Callable[[], Any] = self.module.train_dataloader
        self._made: list[Any] = []
        self._built: list[Any] = []
        self._is_set_up = False

    @property
    def facts(self) -> dict[str, Any]:
        """What the data says of itself after `setup("fit")`; models may ask for it."""
        if self._facts is None:
            if not hasattr(self.module, "facts"):
                return {}
            self.set_up()
            self._facts = self.module.facts()
        return self._facts

    @property
    def plan(self) -> BatchPlan:
        """`data.batch_size` where given; else the module's own loader says the micro-batch, as in Lightning."""
        if self._plan is None:
            batch_size, micro_batch = self.config.data.get("batch_size"), self.config.data.get("micro_batch")
            if batch_size is None:
                micro_batch = micro_batch or getattr(self._made_train_loader(), "batch_size", None) or 1
                accumulate = self.config.trainer.accumulate_grad_batches or 1
                batch_size = micro_batch * self.place.world_size * accumulate
            self._plan = BatchPlan.of(batch_size, micro_batch, self.place.world_size)
        return self._plan

    def set_up(self, module: LightningModule | None = None) -> None:
        """Prepare the data and set it up for "fit", once. `module`: what will be trained, where it is there already."""
        if self._is_set_up:
            return
        self._is_set_up = True
        trainer, owner = self.trainer, self.module
        if module is not None:
            trainer.strategy.connect(module)
            module.trainer = trainer
        trainer.datamodule = owner  # type: ignore[attr-defined]
        owner.trainer = trainer
        state = trainer.state.fn, trainer.state.status, trainer.state.stage
        trainer.state.fn, trainer.state.status, trainer.training = TrainerFn.FITTING, TrainerStatus.RUNNING, True
        with generators_untouched():
            self._prepare()
            self._generators.restore()
            self._call("setup", stage=TrainerFn.FITTING)
            self._generators = Generators()
        trainer.state.fn, trainer.state.status, trainer.state.stage = state
        _skip_once(owner, "setup", stage=TrainerFn.FITTING)
        self._train = owner.train_dataloader
        owner.train_dataloader = self.training_loader  # type: ignore[method-assign]
        for name in EVALUATIONS:
            if is_overridden(name, owner):
                setattr(owner, name, self._sharded(getattr(owner, name)))

    def _call(self, hook: str, **arguments: Any) -> Any:
        return call._call_lightning_datamodule_hook(self.trainer, hook, **arguments)

    def _prepare(self) -> None:
        owner, trainer = self.module, self.trainer
        if not is_overridden("prepare_data", owner):
            return
        with _InfiniteBarrier():  # the others wait for as long as a download takes
            if trainer.local_rank == 0 and (owner.prepare_data_per_node or trainer.node_rank == 0):
                self._call("prepare_data")
        _skip_once(owner, "prepare_data")

    def _made_by(self, original: Callable[[], Any]) -> Any:
        """What the user's method returns; random numbers that it draws are the same on every rank and each time."""
        with generators_untouched():
            self._generators.restore()
            return original()

    def _made_train_loader(self) -> Any:
        if not self._made:
            self._made.append(self._made_by(self._train))
        return self._made[0]

    def training_loader(self) -> Any:
        """The train loader, rebuilt."""
        options = self.config.trainer
        if not self._built:
            loader = self._made_train_loader()
            plain = type(loader) is DataLoader
            if plain:
                loader = fewer_samples(loader, options, self.plan)
            self._built.append(resumable(loader, self.plan, self.place.rank, self.config.seed) if plain else loader)
        limit_epoch(self._built[0], options, self.plan, self.trainer)
        return self._built[0]

    def _sharded(self, original: Callable[[], Any]) -> Callable[[], Any]:
        """Evaluation loaders that give each sample once over all the ranks."""
        rank = self.place

        def loader() -> Any:
            found = self._made_by(original)
            if type(found) is DataLoader:
                return evaluation(found, rank.rank, rank.world_size)
            if isinstance(found, list) and all(type(one) is DataLoader for one in found):
                return [evaluation(one, rank.rank, rank.world_size) for one in found]
            return found

        return loader

    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in an epoch; None where the loader has no length."""
        try:
            return math.ceil(len(self.training_loader()) / self.plan.accumulate)
        except TypeError:
            return None


def _skip_once(owner: Any, name: str, **arguments: Any) -> None:
    """Make the next call of this method with these arguments do nothing: Lightning's, of what was called before."""
    original = getattr(owner, name)
    skipped = False

    def called(*positional: Any, **given: Any) -> Any:
        nonlocal skipped
        if skipped or positional or given != arguments:
            return original(*positional, **given)
        skipped = True
        return None

    setattr(owner, name, called)
