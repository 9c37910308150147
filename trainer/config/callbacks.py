"""Refuse Lightning callbacks that cannot work here. Imports no Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.core.errors import UserError

REFUSED = {
    "BatchSizeFinder": (
        "it changes the batch size while the job runs; here the global batch is data.batch_size at any number of ranks",
        "remove it and set data.batch_size; data.micro_batch is the batch of a forward pass, and"
        " data.micro_batch=auto finds the largest that fits into memory",
    )
}
"""Problem and fix by class."""
_PACKAGES = ("lightning.", "pytorch_lightning.")


def problems_of_callbacks(config: dict[str, Any]) -> Iterator[UserError]:
    """Yield an error for each refused callback of a composed configuration."""
    for name, node in config["callbacks"].items():
        target = str(node.get("_target_")) if isinstance(node, dict) else ""
        refused = REFUSED.get(target.rpartition(".")[2])
        if refused is not None and target.startswith(_PACKAGES):
            yield UserError(f"callbacks.{name}._target_={target}: {refused[0]}", refused[1])
