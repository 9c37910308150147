"""Check before the launch that the direction of `checkpoint.monitor` (lower or higher is better) can be known."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import sources
from trainer.config.direction import direction_of
from trainer.core.errors import UserError

_SOURCES_OF_DIRECTION = ("torchmetrics", "primary_metric", "higher_is_better")
"""Words in a module's source that may define the direction at run time."""
_SKIPPED_PACKAGES = ("lightning", "torch", "pytorch_lightning")


def problems_of_monitor(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield an error if neither the name of the metric nor the source of the module defines a direction."""
    options = config["checkpoint"]
    monitor = options.get("monitor")
    if monitor is None or options.get("mode") is not None or direction_of(str(monitor)) is not None:
        return
    targets = [config[section].get("_target_") for section in ("model", "task") if config.get(section)]
    if all(isinstance(target, str) and _is_silent(target, cwd) for target in targets if target is not None):
        yield UserError(
            f"checkpoint.monitor={monitor}: its name does not show whether lower or higher is better",
            "write checkpoint.mode=min or checkpoint.mode=max",
        )


def _is_silent(target: str, cwd: Path) -> bool:
    """Return whether the source of a class and of all its bases is known, and none defines a direction."""
    pending: list[Any] = [sources.find(target, cwd)]
    for _ in range(20):
        if not pending:
            return True
        definition = pending.pop()
        if not isinstance(definition, sources.Definition) or definition.module.file is None:
            return False
        if definition.module.name.partition(".")[0] in _SKIPPED_PACKAGES:
            continue
        text = definition.module.file.read_text(encoding="utf-8", errors="replace")
        if any(word in text for word in _SOURCES_OF_DIRECTION) or not isinstance(definition.node, ast.ClassDef):
            return False
        for base in definition.node.bases:
            dotted = ast.unparse(base).split(".")
            if dotted[-1] not in ("LightningModule", "Module"):
                pending.append(sources.lookup(definition.module, dotted[0]) if len(dotted) == 1 else None)
    return False
