"""Drop the arguments of the previous class when the command line changes a `_target_`.

The new class would reject the arguments that a config file has for another class, or give them another meaning. Hydra
keeps them; here they are dropped, and one line names them. Arguments on the same command line are set afterwards. A new
optimizer keeps `lr` and `weight_decay` if it takes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.signature import argument_names
from trainer.config.typed import OPEN

_OF_THE_PLACE = ("_target_", "_partial_")
"""Keys that depend on the caller of the target, not on its class."""
_OF_OPTIMIZERS = ("lr", "weight_decay")


def drop_leftovers(node: Any, parts: list[str], value: Any, cwd: Path) -> str | None:
    """Remove the arguments of the current target from `node`, at the key `parts`, before it gets the target `value`.

    Returns:
        A line that names the dropped arguments; None if there are none.
    """
    before = node.get("_target_") if not node._is_none() else None
    if parts[0] not in OPEN or before is None or str(before) == str(value):
        return None
    kept = {*_OF_THE_PLACE, *_shared(str(value), cwd)}
    dropped = [key for key in list(node) if key not in kept]
    for key in dropped:
        del node[key]
    if not dropped:
        return None
    where = ".".join(parts)
    names = ", ".join(f"{where}.{key}" for key in dropped)
    return f"{where}._target_={value}: dropped the arguments of {before} ({names})"


def _shared(target: str, cwd: Path) -> set[str]:
    names = argument_names(target, cwd) or []
    return set(_OF_OPTIMIZERS) & set(names) if "params" in names else set()
