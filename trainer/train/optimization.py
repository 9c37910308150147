"""The optimizer and the learning rate schedule of the configuration, for a module that has none of its own."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from trainer.config.direction import direction_of
from trainer.config.instantiate import accepts, instantiate, locate
from trainer.config.schedule import FILLED, READ_BY_TRAINER, is_plateau
from trainer.config.schema import Config
from trainer.core.errors import UserError

SWITCH = "no_decay_norm_bias"
_NORM = re.compile(r"norm(\d?d)?$", re.IGNORECASE)
"""Of the class of a layer: LayerNorm, RMSNorm, BatchNorm2d, those of other packages."""


@dataclass
class Length:
    """Of the training; null where only time ends it, or the loader has no length."""

    steps: Callable[[], int | None]
    steps_per_epoch: Callable[[], int | None]
    max_epochs: int | None = None

    def of(self, unit: str) -> int | None:
        """In optimizer steps or, rounded up, in epochs."""
        steps = self.steps()
        if unit == "step":
            return steps
        a_epoch = self.steps_per_epoch()
        if steps is not None and a_epoch:
            return math.ceil(steps / a_epoch)
        return self.max_epochs


def configure(module: LightningModule, config: Config, length: Length) -> dict[str, Any]:
    """What `configure_optimizers` returns. Raises UserError where optimizer or schedule do not go with the module."""
    optimizer = make_optimizer(module, config)
    if config.scheduler.get("_target_") is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": make_schedule(module, config, optimizer, length)}


def make_optimizer(module: LightningModule, config: Config) -> Optimizer:
    """Over the parameters that are trained; in two groups where `optimizer.no_decay_norm_bias` is true."""
    parameters: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        fix = "give it a configure_optimizers that returns None: it then trains without one"
        raise UserError(f"{type(module).__name__} has no parameters for an optimizer", fix)
    node = config.optimizer
    target = locate(node["_target_"], "optimizer._target_")
    if not accepts(target, SWITCH):
        switch, node = node.get(SWITCH), {key: value for key, value in node.items() if key != SWITCH}
        if switch:
            if not accepts(target, "weight_decay"):
                fix = f"use optimizer.{SWITCH}=false"
                raise UserError(f"optimizer.{SWITCH}: {node['_target_']} has no weight_decay", fix)
            parameters = decay_groups(module)
    return instantiate(node, parameters, where="optimizer")  # type: ignore[no-any-return]


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters in a group with the optimizer's weight decay, and one, of the biases and of all that
    normalization layers have, with none."""
    decays: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for layer in module.modules():
        is_norm = _NORM.search(type(layer).__name__) is not None or isinstance(layer, nn.modules.batchnorm._NormBase)
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_bias = name == "bias" or name.endswith("_bias")
            (rest if is_norm or is_bias else decays).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decays}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_schedule(module: LightningModule, config: Config, optimizer: Optimizer, length: Length) -> dict[str, Any]:
    """Lightning's `lr_scheduler` dictionary of the section `scheduler`."""
    node = config.scheduler
    target = locate(node["_target_"], "scheduler._target_")
    own = {key: node[key] for key in READ_BY_TRAINER if node.get(key) is not None and not accepts(target, key)}
    node = {key: value for key, value in node.items() if key not in READ_BY_TRAINER or accepts(target, key)}
    own.setdefault("interval", "step")
    if is_plateau(node):
        _follow(node, own, module, config)
    unit, frequency = own["interval"], own.get("frequency", 1)

    def steps_of(one: str) -> int | None:
        found = length.of(one)
        return None if found is None else max(1, found // (frequency if one == unit else 1))

    own["scheduler"] = _made(node, optimizer, steps_of, unit, "scheduler")
    return own


def _follow(node: dict[str, Any], own: dict[str, Any], module: LightningModule, config: Config) -> None:
    """The metric of a plateau, and which way is better: the run's own where nothing is said."""
    primary = getattr(module, "primary_metric", None) or (None, None)
    name, mode = primary
    if config.checkpoint.monitor is not None:
        same = config.checkpoint.monitor == name
        name, mode = config.checkpoint.monitor, config.checkpoint.mode or (mode if same else None)
    monitor = own.setdefault("monitor", name)
    if monitor is None:
        fix = "write scheduler.monitor=val_loss, the name of one that validation_step logs"
        raise UserError("scheduler.monitor is missing: ReduceLROnPlateau follows a metric", fix)
    if node.get("mode") is None:
        node["mode"] = (mode if monitor == name else None) or direction_of(monitor)
    if node["mode"] is None:
        fix = "write scheduler.mode=min or scheduler.mode=max"
        raise UserError(f"scheduler.mode is missing: the name {monitor} does not tell whether less is better", fix)


def _made(
    node: dict[str, Any], optimizer: Optimizer, steps_of: Callable[[str], int | None], unit: str, where: str
) -> Any:
    """A scheduler; those inside of SequentialLR and ChainedScheduler get the optimizer and their part of the length."""
    target = locate(node["_target_"], f"{where}._target_")
    extra: dict[str, Any] = {}
    if isinstance(node.get("schedulers"), list):
        bounds = [0, *(node.get("milestones") or []), steps_of(unit)]
        inner = []
        for place, one in enumerate(node["schedulers"]):
            part = steps_of
            if node.get("milestones"):
                begin, end = bounds[place : place + 2]
                part = _constant(None if end is None else max(1, end - begin))
            inner.append(_made(one, optimizer, part, unit, f"{where}.schedulers[{place}]"))
        extra["schedulers"] = inner
    given_by_epochs = node.get("epochs") is not None and node.get("steps_per_epoch") is not None
    for name in FILLED:
        if _is_left_open(target, node, name) and not (name == "total_steps" and given_by_epochs):
            found = steps_of("epoch" if name == "max_epochs" else unit)
            if found is None:
                fix = f"write {where}.{name}=N, or set trainer.max_steps"
                raise UserError(f"{where}.{name}: how long the training will be is not known", fix)
            extra[name] = found
    given = {key: value for key, value in node.items() if key not in extra}
    if accepts(target, "optimizer"):
        return instantiate(given, where=where, optimizer=optimizer, **extra)
    return instantiate(given, optimizer, where=where, **extra)


def _constant(steps: int | None) -> Callable[[str], int | None]:
    return lambda unit: steps


def _is_left_open(target: Any, node: dict[str, Any], name: str) -> bool:
    """Null, or left out where the target has no number of its own."""
    if not accepts(target, name) or node.get(name) is not None:
        return False
    default = inspect.signature(target).parameters[name].default
    return name in node or default is None or default is inspect.Parameter.empty
