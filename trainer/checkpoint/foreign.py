"""Weights in a file that somebody else's program pickled: Lightning's `.ckpt`, `torch.save` of a state dict.

Such a file may also hold objects: hyper-parameters with a DictConfig, a Path or a partial, or a class of a package that
is not installed here. Reading them would run code from the file. Only tensors and plain values are read; in the place
of each object there is an empty one.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


class Ignored:
    """Stands for an object of a class that is not read."""

    def __new__(cls, *arguments: Any, **named: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: tuple[type, ...] = (Ignored, OrderedDict, list)
"""What is tried: a pickle fills subclasses of dict and list item by item, which torch allows only for these."""


def read_pickled(path: Path) -> dict[str, Any]:
    """The plain part of the file, on the CPU. Runs no code of it.

    Raises OSError where it cannot be read, pickle.UnpicklingError where it is no file of torch's or more than data.
    """
    try:
        return _load(path)
    except UnpicklingError as error:
        problem = error
    unknown = get_unsafe_globals_in_checkpoint(path)
    for stand_in in _STAND_INS if unknown else ():
        try:
            with safe_globals([(stand_in, name) for name in unknown]):
                return _load(path)
        except (UnpicklingError, TypeError, ValueError, AttributeError):
            continue
    raise problem


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
