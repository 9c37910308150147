"""What does not go together with manual optimization, and with a callback that accumulates by itself.

Lightning refuses it on the ranks, in the words of its Trainer's arguments, which nobody wrote here.
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
_MOST_BASES = 12


def problems_of_optimization(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Of a model whose text says that it optimizes manually; what the text does not tell, the ranks refuse."""
    trainer = config["trainer"]
    clips = [(key, trainer.get(f"gradient_clip_{key}")) for key in ("norm", "val")]
    clips = [(key, value) for key, value in clips if value]
    schedulers = _schedulers(config)
    target = config["model"].get("_target_")
    accumulate = trainer.get("accumulate_grad_batches") or 1
    if not (clips or schedulers or accumulate > 1) or not isinstance(target, str):
        return
    found = find(target, cwd)
    if not isinstance(found, Definition) or _flag(found, _MOST_BASES) is not False:
        return
    for key, value in clips:
        by_value = trainer.get("gradient_clip_algorithm") == "value"
        yield clips_manually(f"gradient_clip_{key}", value, "value" if by_value else "norm")
    if accumulate > 1:
        fix = "leave it out, and accumulate in training_step"
        yield UserError(f"trainer.accumulate_grad_batches={accumulate}: the module optimizes manually", fix)
    for name in schedulers:
        yield accumulates_manually(f"callbacks.{name}")


def problems_of_accumulation(config: dict[str, Any], plan: BatchPlan) -> Iterator[UserError]:
    """Of a GradientAccumulationScheduler beside micro-batches."""
    for name in _schedulers(config):
        if plan.accumulate > 1:
            yield accumulates_twice(f"callbacks.{name}", plan)


def clips_manually(key: str, value: float, algorithm: str) -> UserError:
    return UserError(
        f"trainer.{key}={value:g}: the module optimizes manually, where nothing clips its gradients",
        f"write trainer.{key}=null, and in training_step, before each step:"
        f' self.clip_gradients(optimizer, gradient_clip_val={value:g}, gradient_clip_algorithm="{algorithm}")',
    )


def accumulates_manually(where: str) -> UserError:
    return UserError(
        f"{where}: {_SCHEDULER}: the module optimizes manually and steps when it will",
        "remove the callback, and accumulate in training_step",
    )


def accumulates_twice(where: str, plan: BatchPlan) -> UserError:
    return UserError(
        f"{where}: {_SCHEDULER}, with data.batch_size={plan.global_batch} in {plan.accumulate} micro-batches: both say"
        " how many batches make an optimizer step",
        f"remove the callback, or write data.batch_size={plan.world_size * plan.micro_batch} so that a step is one"
        " micro-batch, which the callback then multiplies",
    )


def _schedulers(config: dict[str, Any]) -> list[str]:
    return [
        name
        for name, node in config["callbacks"].items()
        if isinstance(node, dict) and str(node.get("_target_")).rpartition(".")[2] == _SCHEDULER
    ]


def _flag(found: Definition, hops: int) -> bool | None:
    """`self.automatic_optimization` as `__init__` sets it, without a condition; null where it does not say."""
    if not isinstance(found.node, ast.ClassDef) or hops == 0:
        return None
    for node in found.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for statement in reversed(node.body):
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == f"self.{_FLAG}":
                    value = statement.value
                    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, bool) else None
    for base in found.node.bases:
        above = lookup(found.module, ast.unparse(base)) if isinstance(base, (ast.Name, ast.Attribute)) else None
        if isinstance(above, Definition):
            return _flag(above, hops - 1)
    return None
