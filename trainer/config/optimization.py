"""Options that exclude manual optimization, and a callback that accumulates gradients by itself.

Lightning refuses them in the ranks, with the names of Trainer arguments that the user did not write.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.batch import BatchPlan
from trainer.config.sources import Definition, find, lookup
from trainer.core.errors import UserError

_SCHEDULER = "GradientAccumulationScheduler"
_FLAG = "automatic_optimization"
_MANUAL = "the module uses manual optimization"
_MAX_BASES = 12
"""Maximum number of base classes to follow."""


def problems_of_optimization(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield options that exclude manual optimization if the source of the model sets it.

    If the source does not show it, the ranks refuse these options.
    """
    trainer = config["trainer"]
    clips = [(key, trainer.get(f"gradient_clip_{key}")) for key in ("norm", "val")]
    clips = [(key, value) for key, value in clips if value]
    schedulers = _schedulers(config)
    target = config["model"].get("_target_")
    accumulate = trainer.get("accumulate_grad_batches") or 1
    if not (clips or schedulers or accumulate > 1) or not isinstance(target, str):
        return
    definition = find(target, cwd)
    if not isinstance(definition, Definition) or _flag(definition, _MAX_BASES) is not False:
        return
    for key, value in clips:
        by_value = trainer.get("gradient_clip_algorithm") == "value"
        yield clips_manually(f"gradient_clip_{key}", value, "value" if by_value else "norm")
    if accumulate > 1:
        fix = "remove it, and accumulate in training_step"
        yield UserError(f"trainer.accumulate_grad_batches={accumulate}: {_MANUAL}", fix)
    for name in schedulers:
        yield accumulates_manually(f"callbacks.{name}")


def problems_of_accumulation(config: dict[str, Any], plan: BatchPlan) -> Iterator[UserError]:
    """Yield an error for a GradientAccumulationScheduler together with micro-batches."""
    for name in _schedulers(config):
        if plan.accumulate > 1:
            yield accumulates_twice(f"callbacks.{name}", plan)


def clips_manually(key: str, value: float, algorithm: str) -> UserError:
    """Return the error for gradient clipping with manual optimization."""
    return UserError(
        f"trainer.{key}={value:g}: {_MANUAL}, so its gradients are not clipped",
        f"write trainer.{key}=null, and in training_step, before each step:"
        f' self.clip_gradients(optimizer, gradient_clip_val={value:g}, gradient_clip_algorithm="{algorithm}")',
    )


def accumulates_manually(where: str) -> UserError:
    """Return the error for a GradientAccumulationScheduler with manual optimization."""
    return UserError(
        f"{where}: {_SCHEDULER}: {_MANUAL} and decides itself when to step",
        "remove the callback, and accumulate in training_step",
    )


def accumulates_twice(where: str, plan: BatchPlan) -> UserError:
    """Return the error for a GradientAccumulationScheduler together with micro-batches."""
    return UserError(
        f"{where}: {_SCHEDULER} and data.batch_size={plan.global_batch} in {plan.accumulate} micro-batches both set"
        " the number of batches per optimizer step",
        f"remove the callback, or write data.batch_size={plan.world_size * plan.micro_batch} so that a step is one"
        " micro-batch, which the callback then multiplies",
    )


def _schedulers(config: dict[str, Any]) -> list[str]:
    return [
        name
        for name, node in config["callbacks"].items()
        if isinstance(node, dict) and str(node.get("_target_")).rpartition(".")[2] == _SCHEDULER
    ]


def _flag(definition: Definition, hops: int) -> bool | None:
    """Return the value to which `__init__` sets `self.automatic_optimization` unconditionally; None if unknown."""
    if not isinstance(definition.node, ast.ClassDef) or hops == 0:
        return None
    for node in definition.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for statement in reversed(node.body):
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == f"self.{_FLAG}":
                    value = statement.value
                    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, bool) else None
    for base in definition.node.bases:
        above = lookup(definition.module, ast.unparse(base)) if isinstance(base, (ast.Name, ast.Attribute)) else None
        if isinstance(above, Definition):
            return _flag(above, hops - 1)
    return None
