"""LightningModules that create layers in `setup` or `configure_model`, when data and device mesh are known.

Until Lightning has called these hooks, the module does not have all of its parameters. Code that reads parameters
(initial weights, frozen layers, LoRA, synchronized batch normalization, the parameter count in the log) waits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parameter import is_lazy

from trainer.core.errors import UserError
from trainer.strategies.deferred import CannotDefer, Deferral
from trainer.strategies.initialization import make_whole
from trainer.strategies.mesh import is_split

HOOKS = ("configure_model", "configure_sharded_model", "setup")
"""Hooks that may create parameters. The last one is called first."""
_SHARDING = {"device_mesh", "fully_shard", "parallelize_module", "distribute_tensor", "distribute_module"}
"""Names in the code of a hook that shards or splits layers."""


def builds_in_hooks(module: LightningModule) -> bool:
    """Return whether parameters may be created or initialized after the module's `__init__`."""
    return any(is_overridden(hook, module, LightningModule) for hook in HOOKS)


def call_when_built(module: LightningModule, function: Callable[[], None]) -> None:
    """Call `function` once all of the module's parameters exist: now, or after the last of its hooks.

    This is before Lightning loads a checkpoint and before the strategy wraps the module. Several functions are called
    in the order in which they were given.
    """
    hook = next((name for name in HOOKS if is_overridden(name, module, LightningModule)), None)
    if hook is None:
        function()
        return
    waiting = getattr(getattr(module, hook), "waiting", None)
    if waiting is None:
        waiting = _wrap_hook(module, hook)
    waiting.append(function)


def record_hooks(module: LightningModule, deferral: Deferral) -> None:
    """Record what the module's hooks do to its parameters, which may be on the meta device.

    Hooks that shard or split layers themselves are not recorded: parameters get their values before these are called.
    """
    hooks = [name for name in HOOKS if is_overridden(name, module, LightningModule)]
    if any(_shards(getattr(module, name)) for name in hooks):
        make_whole(module)
        return
    for name in hooks:
        vars(module)[name] = _recorded(getattr(module, name), module, deferral)


def _recorded(original: Callable[..., None], module: LightningModule, deferral: Deferral) -> Callable[..., None]:
    @functools.wraps(original)  # as in `_wrap_hook`
    def hook(*arguments: Any, **named: Any) -> None:
        if is_split(module):  # called again, after the strategy has sharded the module
            original(*arguments, **named)
            return
        try:
            with deferral.recording():
                original(*arguments, **named)
        except CannotDefer as error:
            problem = f"{type(module).__name__}.{original.__name__} initializes parameters in a way that"
            fix = "set strategy.defer_parameters=false, or initialize them in __init__"
            raise UserError(f"{problem} cannot be deferred until they are sharded: {error}", fix) from error

    return hook


def _shards(hook: Callable[..., None]) -> bool:
    """Return whether the code of a hook shards or splits layers."""
    codes = [hook.__code__] if hasattr(hook, "__code__") else []
    while codes:
        code = codes.pop()
        if not _SHARDING.isdisjoint(code.co_names):
            return True
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
    return False


def run_build_hooks(module: LightningModule, trainer: Trainer) -> None:
    """Call the hooks as `trainer.fit` would, for a module that is not trained: an export, a parameter count."""
    if builds_in_hooks(module):
        trainer.strategy.connect(module)
        module.trainer = trainer
        trainer.state.fn = TrainerFn.FITTING
        call._call_lightning_module_hook(trainer, "setup", stage=TrainerFn.FITTING)
        call._call_configure_model(trainer)


def _wrap_hook(module: LightningModule, hook: str) -> list[Callable[[], None]]:
    """Return a list whose functions are called after the next call of `hook`."""
    original, instance_attribute = getattr(module, hook), vars(module).get(hook)
    waiting: list[Callable[[], None]] = []

    # wraps: Lightning looks through it when it checks whether the module overrides the hook
    @functools.wraps(original)
    def build(*arguments: Any, **named: Any) -> None:
        try:
            original(*arguments, **named)
        except TypeError as error:
            refusal = _missing_mesh_error(module, original)
            if refusal is None:
                raise
            raise refusal from error
        # Once: the hook may be called again, and then changes nothing (Lightning's docs of `configure_model`).
        vars(module).pop(hook)
        if instance_attribute is not None:
            vars(module)[hook] = instance_attribute
        for function in waiting:
            function()

    build.waiting = waiting  # type: ignore[attr-defined]
    vars(module)[hook] = build
    return waiting


def _missing_mesh_error(module: LightningModule, hook: Callable[..., None]) -> UserError | None:
    """Return the UserError behind a TypeError in the hook, if the cause is a missing device mesh."""
    code = getattr(hook, "__code__", None)
    if module.device_mesh is not None or code is None or "device_mesh" not in code.co_names:
        return None
    problem = f"{type(module).__name__}.{hook.__name__} uses self.device_mesh, which this strategy does not have"
    return UserError(problem, "set strategy=fsdp, strategy=hsdp or strategy=tp")


def num_elements(parameter: Any) -> int:
    """Return the number of elements of the whole parameter, sharded or not; 0 for an uninitialized lazy one."""
    if is_lazy(parameter):
        return 0
    # `ds_numel`: under DeepSpeed this rank may hold no more than a shard.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
