"""Whether it can be known which values of `checkpoint.monitor` are better, before anything is launched."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import sources
from trainer.config.direction import direction_of
from trainer.core.errors import UserError

_TELL = ("torchmetrics", "primary_metric", "higher_is_better")
"""What in a module's source may tell it once it runs."""
_NOT_LOOKED_AT = ("lightning", "torch", "pytorch_lightning")


def problems_of_monitor(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Of a composed configuration: a metric without a known direction, in a module that does not tell it either."""
    options = config["checkpoint"]
    monitor = options.get("monitor")
    if monitor is None or options.get("mode") is not None or direction_of(str(monitor)) is not None:
        return
    targets = [config[section].get("_target_") for section in ("model", "task") if config.get(section)]
    if all(isinstance(target, str) and _is_silent(target, cwd) for target in targets if target is not None):
        yield UserError(
            f"checkpoint.monitor={monitor}: its name does not say whether more or less of it is better",
            "write checkpoint.mode=min or checkpoint.mode=max",
        )


def _is_silent(target: str, cwd: Path) -> bool:
    """Whether the files of a class and of its bases were read, and none may tell."""
    waiting: list[Any] = [sources.find(target, cwd)]
    for _ in range(20):
        if not waiting:
            return True
        found = waiting.pop()
        if not isinstance(found, sources.Definition) or found.module.file is None:
            return False
        if found.module.name.partition(".")[0] in _NOT_LOOKED_AT:
            continue
        text = found.module.file.read_text(encoding="utf-8", errors="replace")
        if any(word in text for word in _TELL) or not isinstance(found.node, ast.ClassDef):
            return False
        for base in found.node.bases:
            dotted = ast.unparse(base).split(".")
            if dotted[-1] not in ("LightningModule", "Module"):
                waiting.append(sources.lookup(found.module, dotted[0]) if len(dotted) == 1 else None)
    return False
