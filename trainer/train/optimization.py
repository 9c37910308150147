"""Optimizer and learning rate scheduler from the configuration, for a module without its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from trainer.config.direction import direction_of
from trainer.config.instantiate import accepts, instantiate, locate
from trainer.config.schedule import FILLED, READ_BY_TRAINER, is_plateau
from trainer.config.schema import Config
from trainer.config.strategy_limits import has_fused
from trainer.core.errors import UserError
from trainer.train.parameter_groups import Decay, parameter_groups

SWITCH = "no_decay_norm_bias"
DECAY = "decay"
AUTO = "auto"
"""Value of `optimizer.fused`: the kernel is chosen here."""


@dataclass
class TrainingLength:
    """Length of the training; None if only time ends it, or the loader has no length."""

    steps: Callable[[], int | None]
    steps_per_epoch: Callable[[], int | None]
    max_epochs: int | None = None

    def of(self, unit: str) -> int | None:
        """Return the length in `unit`: optimizer steps (`step`), or epochs, rounded up (`epoch`)."""
        steps = self.steps()
        if unit == "step":
            return steps
        steps_per_epoch = self.steps_per_epoch()
        if steps is not None and steps_per_epoch:
            return math.ceil(steps / steps_per_epoch)
        return self.max_epochs


def configure(module: LightningModule, config: Config, length: TrainingLength) -> dict[str, Any]:
    """Return the result of `configure_optimizers`.

    Raises:
        UserError: If optimizer or scheduler do not fit the module.
    """
    optimizer = make_optimizer(module, config)
    if config.scheduler.get("_target_") is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": make_schedule(module, config, optimizer, length)}


def make_optimizer(module: LightningModule, config: Config) -> Optimizer:
    """Return the optimizer over the trainable parameters, in groups if `optimizer.decay` or the optimizer has them."""
    parameters: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        fix = "give it a configure_optimizers that returns None: it then trains without one"
        raise UserError(f"{type(module).__name__} has no parameters for an optimizer", fix)
    node = dict(config.optimizer)
    target = locate(node["_target_"], "optimizer._target_")
    chosen = {key: node.pop(key, None) for key in (SWITCH, DECAY) if not accepts(target, key)}
    decay: Decay = "all" if chosen.get(DECAY) != "matrices" else "matrices"
    if chosen.get(SWITCH):
        decay = "no_norm_bias"
    if decay != "all" and not accepts(target, "weight_decay"):
        key, fix = (SWITCH, "false") if chosen.get(SWITCH) else (DECAY, "null")
        raise UserError(f"optimizer.{key}: {node['_target_']} has no weight_decay", f"use optimizer.{key}={fix}")
    muon = getattr(target, "splits_matrices", False)
    if decay != "all" or muon:
        parameters = parameter_groups(module, decay, muon)
    if node.get("fused") == AUTO:
        _choose_kernel(node, module, config)
    return instantiate(node, parameters, where="optimizer")  # type: ignore[no-any-return]


def _choose_kernel(node: dict[str, Any], module: LightningModule, config: Config) -> None:
    """Replace `fused: auto` by a choice for this rank's device, and log it.

    The foreach kernels of torch's default need as much memory as the parameters for temporary tensors: 4 bytes per
    parameter, 32 GB for 8B. The fused kernel needs none. On the CPU it depends on the place of an element in its tensor
    whether it is computed by a vector instruction, and so how it is rounded: sharding would change the result.
    """
    del node["fused"]
    strategy, options = module.trainer.strategy, config.trainer
    name = str(node["_target_"]).rpartition(".")[2]
    offloads = getattr(config.strategy, "cpu_offload", False) or (
        getattr(config.strategy, "offload_optimizer", "none") != "none"
    )
    if strategy.root_device.type == "cpu":
        reason = "the fused kernel rounds differently by shard; optimizer.fused=true is faster"
    elif strategy.root_device.type != "cuda":
        reason = f"not known for {strategy.root_device.type}"
    elif offloads:
        reason = "the step is on the CPU"
    elif options.precision == "16-mixed" and (options.gradient_clip_norm or options.gradient_clip_val):
        reason = "a fused optimizer unscales the gradients of 16-mixed after they would be clipped"
    elif not has_fused(node["_target_"], config.strategy.name):
        reason = f"torch has no fused {name} of sharded parameters"
    elif any(not parameter.is_floating_point() for parameter in module.parameters()):
        reason = "some parameters are not floating point numbers"
    else:
        node["fused"] = True
        reason = ""
    if module.trainer.is_global_zero:
        kernel = "fused kernel" if not reason else f"torch's default kernels ({reason})"
        print(f"optimizer: {name}, {kernel}", flush=True)


def make_schedule(
    module: LightningModule, config: Config, optimizer: Optimizer, length: TrainingLength
) -> dict[str, Any]:
    """Return Lightning's `lr_scheduler` dictionary for the section `scheduler`."""
    node = config.scheduler
    target = locate(node["_target_"], "scheduler._target_")
    result = {key: node[key] for key in READ_BY_TRAINER if node.get(key) is not None and not accepts(target, key)}
    node = {key: value for key, value in node.items() if key not in READ_BY_TRAINER or accepts(target, key)}
    result.setdefault("interval", "step")
    if is_plateau(node):
        _set_plateau_metric(node, result, module, config)
    unit, frequency = result["interval"], result.get("frequency", 1)

    def length_in(other_unit: str) -> int | None:
        total = length.of(other_unit)
        return None if total is None else max(1, total // (frequency if other_unit == unit else 1))

    result["scheduler"] = _make_scheduler(node, optimizer, length_in, unit, "scheduler")
    return result


def _set_plateau_metric(node: dict[str, Any], result: dict[str, Any], module: LightningModule, config: Config) -> None:
    """Set metric and mode of ReduceLROnPlateau; by default those by which the run chooses its best checkpoint."""
    primary = getattr(module, "primary_metric", None) or (None, None)
    name, mode = primary
    if config.checkpoint.monitor is not None:
        same = config.checkpoint.monitor == name
        name, mode = config.checkpoint.monitor, config.checkpoint.mode or (mode if same else None)
    monitor = result.setdefault("monitor", name)
    if monitor is None:
        fix = "write scheduler.monitor=val_loss, the name of a metric that validation_step logs"
        raise UserError("scheduler.monitor is missing: ReduceLROnPlateau needs a metric", fix)
    if node.get("mode") is None:
        node["mode"] = (mode if monitor == name else None) or direction_of(monitor)
    if node["mode"] is None:
        fix = "write scheduler.mode=min or scheduler.mode=max"
        raise UserError(f"scheduler.mode is missing: it is not known whether lower is better for {monitor}", fix)


def _make_scheduler(
    node: dict[str, Any], optimizer: Optimizer, length_in: Callable[[str], int | None], unit: str, where: str
) -> Any:
    """Instantiate a scheduler; those inside SequentialLR and ChainedScheduler get their part of the length."""
    target = locate(node["_target_"], f"{where}._target_")
    extra: dict[str, Any] = {}
    if isinstance(node.get("schedulers"), list):
        bounds = [0, *(node.get("milestones") or []), length_in(unit)]
        inner = []
        for place, inner_node in enumerate(node["schedulers"]):
            part = length_in
            if node.get("milestones"):
                begin, end = bounds[place : place + 2]
                part = _constant(None if end is None else max(1, end - begin))
            inner.append(_make_scheduler(inner_node, optimizer, part, unit, f"{where}.schedulers[{place}]"))
        extra["schedulers"] = inner
    given_by_epochs = node.get("epochs") is not None and node.get("steps_per_epoch") is not None
    for name in FILLED:
        if _is_unset(target, node, name) and not (name == "total_steps" and given_by_epochs):
            total = length_in("epoch" if name == "max_epochs" else unit)
            if total is None:
                fix = f"write {where}.{name}=N, or set trainer.max_steps"
                raise UserError(f"{where}.{name}: the length of the training is not known", fix)
            extra[name] = total
    given = {key: value for key, value in node.items() if key not in extra}
    if accepts(target, "optimizer"):
        return instantiate(given, where=where, optimizer=optimizer, **extra)
    return instantiate(given, optimizer, where=where, **extra)


def _constant(steps: int | None) -> Callable[[str], int | None]:
    return lambda unit: steps


def _is_unset(target: Any, node: dict[str, Any], name: str) -> bool:
    """Return whether an argument is null, or left out where the target has no default."""
    if not accepts(target, name) or node.get(name) is not None:
        return False
    default = inspect.signature(target).parameters[name].default
    return name in node or default is None or default is inspect.Parameter.empty
