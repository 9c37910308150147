"""A `_target_` that the command line changes starts from an empty node.

The arguments that a config file has for another class would fail the new one, or mean something else there. Hydra
leaves them; here they go away, and one line says which. What is given on the same command line is set afterwards, and
stays. An optimizer keeps `lr` and `weight_decay` where the new one takes them, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.signature import argument_names
from trainer.config.typed import OPEN

_OF_THE_PLACE = ("_target_", "_partial_")
"""Said by who calls the target, not by what it is."""
_OF_OPTIMIZERS = ("lr", "weight_decay")


def drop_leftovers(node: Any, parts: list[str], value: Any, cwd: Path) -> str | None:
    """Take the arguments of another target out of `node`, at the key `parts`, which is about to get the target `value`.

    Returns the line that says what is dropped; null when nothing is.
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
    return f"{where}._target_={value}: starts without the arguments of {before} ({names})"


def _shared(target: str, cwd: Path) -> set[str]:
    names = argument_names(target, cwd) or []
    return set(_OF_OPTIMIZERS) & set(names) if "params" in names else set()
