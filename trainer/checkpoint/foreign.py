"""Weights from files that other programs pickled: Lightning's `.ckpt`, or `torch.save` of a state dict.

The file may also hold objects: hyperparameters with a DictConfig, a Path or a partial, or a class of a package that is
not installed here. Unpickling them would run code from the file. Only tensors and plain values are read; an empty
placeholder takes the place of each object.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from trainer.checkpoint import data_file
from trainer.checkpoint.wellformed import BadCheckpoint


class Ignored:
    """Placeholder for an object whose class is not loaded."""

    def __new__(cls, *arguments: Any, **named: Any) -> Ignored:
        """Accept the arguments of any class."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: tuple[type, ...] = (Ignored, OrderedDict, list)
"""Placeholders to try in turn.

A pickle fills subclasses of dict and list item by item, which torch allows only for OrderedDict and list.
"""


def read_pickled(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Read the tensors and plain values of the file onto the CPU, without running code from it.

    Args:
        path: The file.
        mapped: Memory-map the tensors, if the file's format allows it: they stay on disk until they are read.

    Raises:
        OSError: The file cannot be read.
        BadCheckpoint: torch.save did not write the file, or it holds more than data.
    """
    problem: BadCheckpoint
    try:
        return _as_dict(path, data_file.load(path, mapped=mapped))
    except BadCheckpoint as error:
        problem = error
    for stand_in in _STAND_INS if (unknown := _unknown(path)) else ():
        try:
            with safe_globals([(stand_in, name) for name in unknown]):
                return _as_dict(path, data_file.load(path, mapped=mapped))
        except BadCheckpoint:
            continue
    raise problem


def _unknown(path: Path) -> list[str]:
    """Return the classes that the file names, from its text."""
    try:
        data_file.require_regular(path)
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file of torch.save; the first problem is reported
        return []


def _as_dict(path: Path, state: Any) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise BadCheckpoint(f"{path} holds a {type(state).__name__}, not a state dict", "name a file with weights")
    return state
