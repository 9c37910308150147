"""Conversion of user objects' states to what a checkpoint holds: plain values and tensors (`weights_only=True`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch

_KIND = "__kind__"


def plain(value: Any) -> Any:
    """Convert `value` to plain values and tensors; `restored` is the inverse.

    Bytes and arrays become tensors.

    Raises:
        TypeError: `value` holds anything else: a checkpoint must not hold pickled objects.
    """
    if value is None or type(value) in (bool, int, float, str) or type(value) is torch.Tensor:
        return value
    if isinstance(value, (bool, int, float, str)):
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if isinstance(value, numpy.generic) and value.dtype != object:
        return value.item()
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        signed = value.astype("int64") if value.dtype.kind == "u" and value.dtype.itemsize > 1 else value
        return {_KIND: f"array {value.dtype.str}", "value": torch.from_numpy(numpy.array(signed))}
    if isinstance(value, (bytes, bytearray)):
        return {_KIND: "bytes", "value": torch.tensor(list(value), dtype=torch.uint8)}
    if isinstance(value, Mapping):
        return {_KIND: "dict", "value": [[plain(key), plain(one)] for key, one in value.items()]}
    if isinstance(value, list):
        return [plain(one) for one in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            ordered = value if kind is tuple else sorted(value, key=repr)
            return {_KIND: kind.__name__, "value": [plain(one) for one in ordered]}
    raise TypeError(f"a {type(value).__name__}")


def restored(value: Any) -> Any:
    """Return the value that `plain` converted."""
    if isinstance(value, list):
        return [restored(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    kind, inner = value[_KIND], value["value"]
    if kind.startswith("array"):
        return inner.numpy().astype(kind.split()[1])
    if kind == "bytes":
        return bytes(inner.tolist())
    if kind == "dict":
        return {restored(key): restored(one) for key, one in inner}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](restored(one) for one in inner)
