"""Step torch's optimizers without the decorators of `Optimizer.step`, where these have nothing to do.

torch decorates `step` twice: with a profiler range and the hooks of a step, and with the gradient mode and two marks
for the compiler. After a backward pass none of that code is in the caches, and it takes 7% of a perceptron's step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)


def _example(optimizer: Optimizer) -> None:
    """Be decorated, so that the code of torch's decorators can be compared."""


_HOOKED = Optimizer.profile_hook_step(_example).__code__
_WITHOUT_GRADIENTS = _use_grad_for_differentiable(_example).__code__


def make_step(optimizer: Optimizer) -> Callable[[Optimizer], object]:
    """Return a function that does what `optimizer.step()` does.

    It calls `step` where something may listen to it: another optimizer than this one, hooks, a profiler, a `step` that
    was replaced since, a `step` that is not decorated as torch's own are.
    """
    kind, attributes = type(optimizer), vars(optimizer)
    decorated: Any = kind.step
    replaced = attributes.get("step")
    function = _undecorated(decorated)
    if function is None or not _is_counted(replaced, decorated) or optimizer.defaults.get("differentiable", True):
        return _step

    def step(current: Optimizer) -> object:
        if (
            current is not optimizer
            or kind.step is not decorated
            or attributes.get("step") is not replaced
            or _has_hooks(optimizer)
            or _profiler_enabled()
        ):
            return current.step()
        if replaced is not None:
            attributes["_opt_called"] = True
        with torch.no_grad():
            return function(optimizer)

    return step


def _has_hooks(optimizer: Optimizer) -> bool:
    """Return whether there are hooks that torch calls before or after a step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or _global_optimizer_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_post_hooks
    )


def _step(optimizer: Optimizer) -> object:
    return optimizer.step()


def _undecorated(step: Any) -> Callable[[Optimizer], object] | None:
    """Return the function inside torch's two decorators; None if there are others."""
    for code in (_HOOKED, _WITHOUT_GRADIENTS):
        if getattr(step, "__code__", None) is not code:
            return None
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def _is_counted(replaced: Any, decorated: Any) -> bool:
    """Return whether `step` of the instance is the class's, or a scheduler's, which only notes that it was called."""
    return replaced is None or (
        getattr(replaced, "_wrapped_by_lr_sched", False) and getattr(replaced, "__wrapped__", None) is decorated
    )
