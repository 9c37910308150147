"""Networks that a LightningModule makes in `setup` or `configure_model`, when the data and the device mesh are known.

Until Lightning has called these hooks the module has not all of its parameters. What looks at parameters (weights to
start from, frozen layers, LoRA, synchronised batch normalisation, the number of parameters in the log) waits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parameter import is_lazy

from trainer.core.errors import UserError

HOOKS = ("configure_model", "configure_sharded_model", "setup")
"""The last called first."""


def builds_later(module: LightningModule) -> bool:
    """Whether parameters may be made or given values after the module's `__init__`."""
    return any(is_overridden(hook, module, LightningModule) for hook in HOOKS)


def once_built(module: LightningModule, then: Callable[[], None]) -> None:
    """Call `then` once all of the module's parameters are there: now, or after the last of its own hooks.

    Before Lightning loads a checkpoint and before the strategy wraps the module. Several are called in this order.
    """
    hook = next((name for name in HOOKS if is_overridden(name, module, LightningModule)), None)
    if hook is None:
        then()
        return
    waiting = getattr(getattr(module, hook), "waiting", None)
    if waiting is None:
        waiting = _wait(module, hook)
    waiting.append(then)


def build_now(module: LightningModule, trainer: Trainer) -> None:
    """Call the hooks as `trainer.fit` would, for what is not trained: an export, a count of parameters."""
    if builds_later(module):
        trainer.strategy.connect(module)
        module.trainer = trainer
        trainer.state.fn = TrainerFn.FITTING
        call._call_lightning_module_hook(trainer, "setup", stage=TrainerFn.FITTING)
        call._call_configure_model(trainer)


def _wait(module: LightningModule, hook: str) -> list[Callable[[], None]]:
    """What is put into the list is called after the next call of `hook`."""
    original, own = getattr(module, hook), vars(module).get(hook)
    waiting: list[Callable[[], None]] = []

    # wraps: Lightning looks through it when it asks whether the module overrides the hook
    @functools.wraps(original)
    def build(*arguments: Any, **named: Any) -> None:
        try:
            original(*arguments, **named)
        except TypeError as error:
            refusal = _no_mesh(module, original)
            if refusal is None:
                raise
            raise refusal from error
        # Once: the hook may be called again, and then changes nothing (Lightning's docs of `configure_model`).
        vars(module).pop(hook)
        if own is not None:
            vars(module)[hook] = own
        for then in waiting:
            then()

    build.waiting = waiting  # type: ignore[attr-defined]
    vars(module)[hook] = build
    return waiting


def _no_mesh(module: LightningModule, hook: Callable[..., None]) -> UserError | None:
    """The reason of a TypeError in the hook, where it is that there is no device mesh."""
    code = getattr(hook, "__code__", None)
    if module.device_mesh is not None or code is None or "device_mesh" not in code.co_names:
        return None
    problem = f"{type(module).__name__}.{hook.__name__} uses self.device_mesh, which this strategy does not have"
    return UserError(problem, "set strategy=fsdp, strategy=hsdp or strategy=tp")


def size_of(parameter: Any) -> int:
    """Elements of the whole parameter, wherever its parts are; 0 for one that is lazy and not made yet."""
    if is_lazy(parameter):
        return 0
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed's, where this rank has no more than that
