"""Builds Lightning objects from a frozen configuration: module, data, strategy, Trainer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.trainer.connectors.callback_connector import _validate_callbacks_list
from lightning.pytorch.utilities.model_helpers import is_overridden

from trainer import strategies
from trainer.checkpoint.io import RunCheckpointIO
from trainer.config.batch import BatchPlan
from trainer.config.instantiate import instantiate, locate
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.models.sync_batch_norm import convert_sync_batch_norm
from trainer.runs.directory import RunDirectory
from trainer.runtime.process import Rank
from trainer.runtime.torch_setup import apply_settings, device_of
from trainer.strategies.deferred import Deferral
from trainer.tracking.no_logger import NoLogger
from trainer.train import deferred_modules, fine_tuning, float8
from trainer.train.data import Data, Group
from trainer.train.exact_means import use_exact_means
from trainer.train.loop import use_lean_loop
from trainer.train.manual_optimization import accumulation_by_epoch
from trainer.train.optimization import TrainingLength, configure
from trainer.train.precision import precision_of, precision_plugins
from trainer.train.save_points import use_save_points
from trainer.train.trainer_arguments import trainer_arguments


def deferral_of(config: Config, rank: Rank) -> Deferral | None:
    """Return what builds the module on the meta device, if the strategy materializes it; else None."""
    defers = strategies.defers(config.strategy, rank.world_size, device_of(config, rank).type)
    return Deferral(rank.rank, rank.world_size) if defers else None


def waits_in_forward(config: Config, rank: Rank) -> bool:
    """Return whether this rank waits for the other ranks inside its forward pass (sharded parameters)."""
    return strategies.waits_in_forward(config.strategy, rank.world_size, device_of(config, rank).type)


def place_in_data(config: Config, rank: Rank) -> Rank:
    """Return the data parallel rank and world size: tensor parallel ranks of one group read the same samples."""
    number, count = strategies.data_parallel(config.strategy, rank.rank, rank.world_size)
    return replace(rank, rank=number, world_size=count)


def accumulate_of(config: Config, data_ranks: int) -> int:
    """Return the micro-batches of an optimizer step. `data_ranks`: number of ranks that read different samples."""
    batch_size = config.data.get("batch_size")
    if batch_size is None:
        return config.trainer.accumulate_grad_batches or 1
    return BatchPlan.of(batch_size, config.data.get("micro_batch"), data_ranks).accumulate


def build_data(config: Config, rank: Rank, trainer: Trainer, group: Group | None = None) -> Data:
    """Instantiate the data module; `Data.set_up`, or the first use of its facts, sets it up."""
    return Data(config, place_in_data(config, rank), trainer, group)


def build_module(
    config: Config, data: Data, total_steps: Callable[[], int | None], deferral: Deferral | None = None
) -> LightningModule:
    """Return the network inside its task, or the user's LightningModule unchanged.

    Layers that a module creates in `setup` or `configure_model` do not exist yet (`train/deferred_modules.py`).
    An argument of the model that is null in the config and known to the data (`facts`) is filled from the data.

    Args:
        config: The run's configuration.
        data: The data of this rank.
        total_steps: Returns the optimizer steps of the whole training, for the scheduler.
        deferral: Puts parameters on the meta device, for the strategy to materialize; None: they are created whole.

    Raises:
        UserError: If the model needs an argument that the data does not provide.
    """
    node = {
        key: data.facts[key] if value is None and key in data.facts else value for key, value in config.model.items()
    }
    try:
        if deferral is None:
            model = instantiate(node, where="model")
        else:
            model = deferral.construct(lambda: instantiate(node, where="model"))
    except (TypeError, AttributeError) as error:
        unknown = [f"model.{key}" for key, value in node.items() if value is None and _is_required(node, key)]
        if not unknown:
            raise
        problem = f"{' and '.join(unknown)}: null, and this data does not provide it; cannot build the model ({error})"
        raise UserError(problem, "choose a model for this kind of data, or set the value") from error
    if isinstance(model, LightningModule):
        module = model
    else:
        task = dict(config.task)
        if task.get("_target_") is None:
            task["_target_"] = data.default_task()
        module = instantiate(task, where="task", model=model)
    if deferral is not None:
        deferred_modules.record_hooks(module, deferral)
    deferred_modules.call_when_built(module, lambda: _apply_options(module, config, deferral))
    if not is_overridden("configure_optimizers", module, LightningModule):
        length = TrainingLength(total_steps, data.steps_per_epoch, config.trainer.max_epochs)
        module.configure_optimizers = MethodType(lambda self: configure(self, config, length), module)  # type: ignore[method-assign]
    return module


def _apply_options(module: LightningModule, config: Config, deferral: Deferral | None) -> None:
    """Apply options that change a module, once it has all of its parameters."""
    with nullcontext() if deferral is None else deferral.recording():
        if config.trainer.sync_batchnorm:
            convert_sync_batch_norm(module, torch.device("cuda" if config.resources.gpus else "cpu"))
        fine_tuning.prepare(module, config.finetune)
    if config.trainer.channels_last:
        module.to(memory_format=torch.channels_last)


def convert_to_float8(module: LightningModule, config: Config, rank: Rank) -> None:
    """Apply `trainer.float8` to a module that will be trained, once it has all of its layers."""

    def convert() -> None:
        recipe, block_class = config.trainer.float8, getattr(config.strategy, "blocks", None)
        count = float8.convert(module, recipe, device_of(config, rank), block_class)
        if count and rank.is_first:
            print(f"{count} linear layers train in float8 ({recipe})", flush=True)

    deferred_modules.call_when_built(module, convert)


def _is_required(node: Mapping[str, Any], key: str) -> bool:
    """Return whether the target of `node` requires this argument."""
    parameter = inspect.signature(locate(node["_target_"], "model._target_")).parameters.get(key)
    return parameter is not None and parameter.default is parameter.empty


def total_steps_of(config: Config, data: Data, callbacks: Sequence[Callback]) -> int | None:
    """Return the optimizer steps of the whole training; None if only `max_time` ends it. `callbacks`: the user's.

    Under manual optimization the number of steps per batch is unknown; one is assumed.
    """
    options = config.trainer
    limits = [] if options.max_steps is None else [options.max_steps]
    steps_per_epoch = data.steps_per_epoch() if options.max_epochs is not None else None
    if steps_per_epoch is not None and options.max_epochs is not None:
        batches = accumulation_by_epoch(callbacks, options.max_epochs)
        limits.append(sum(math.ceil(steps_per_epoch / per_step) for per_step in batches))
    return min(limits) if limits else None


def build_trainer(
    config: Config,
    rank: Rank,
    checkpoint_io: RunCheckpointIO,
    default_root_dir: str,
) -> Trainer:
    """Return Lightning's Trainer without checkpoints, progress bars, samplers and requeueing, which are done here.

    It is built before the data, which may ask it for the ranks; `complete` adds what is built after the model.
    """
    use_exact_means()
    options = config.trainer
    apply_settings(options)
    device = device_of(config, rank)
    accumulate = accumulate_of(config, place_in_data(config, rank).world_size)
    plugins = precision_plugins(config, device)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=rank.local_world_size,
        num_nodes=rank.num_nodes,
        strategy=strategies.build(
            config.strategy,
            world_size=rank.world_size,
            device=device,
            timeout_s=config.resilience.collective_timeout_s,
        ),
        plugins=[TorchElasticEnvironment(), checkpoint_io, *plugins],
        precision=None if plugins else precision_of(config, device),  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        **trainer_arguments(options, accumulate, default_root_dir),
    )
    # Lightning's SIGTERM handler broadcasts on the training's process group from inside the handler, between any two
    # of its collectives, and then ends only this rank. `runtime/stop.py` and `callbacks/boundary.py` stop all ranks.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.loggers = [NoLogger(RunDirectory(Path(default_root_dir)))]  # until `complete`
    if options.lean_loop:
        use_lean_loop(trainer, options.prefetch_to_device)
    else:
        use_save_points(trainer)
    return trainer


def complete(trainer: Trainer, callbacks: list[Callback], loggers: list[Logger]) -> None:
    """Add callbacks and loggers to the Trainer, as its own `__init__` would."""
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    _validate_callbacks_list(trainer.callbacks)  # type: ignore[attr-defined]
    trainer.callbacks = trainer._callback_connector._reorder_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
    trainer.loggers = loggers or trainer.loggers


def plain_trainer() -> Trainer:
    """Return a Trainer of one CPU process that trains nothing, for data modules that use `self.trainer`."""
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
