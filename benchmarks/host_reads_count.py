"""Counts what makes the host wait for the device in a training step, on CPU ranks that stand in for GPUs.

A tensor counts as one of the device if it is a parameter, a gradient, the optimizer's state, a batch, or computed from
one of these. What the ranks agree on over gloo, and random number generators, are the host's.
"""

from __future__ import annotations

import linecache
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "item")
"""Operators whose result or shape the host needs: each waits until the device has come that far."""
TO_HOST = ("cpu", "tolist", "numpy", "__array__")
"""Methods that copy to the host and wait."""
FROM_HOST = ("tensor", "as_tensor", "from_numpy")
"""Functions that make a tensor of numbers, in memory of the host."""
HERE = Path(__file__).resolve().parent


class HostReads:
    """Counts between `start` and `stop`; knows the device's tensors from the time at which it was entered."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """By operator; `deferred` copies are those that do not wait."""
        self.places: Counter[str] = Counter()
        self._counting = False
        self._device: set[int] = set()
        """Addresses of storages."""
        self._modes = (_Operators(self), _Methods(self))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def start(self) -> None:
        self._counting = True

    def stop(self) -> None:
        self._counting = False

    def put_on_device(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            self._device.add(_address(tensor))

    def take_off_device(self, tensor: torch.Tensor) -> None:
        self._device.discard(_address(tensor))

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._device

    def count(self, name: str) -> None:
        if self._counting:
            self.counts[name] += 1
            frames = [one for one in traceback.extract_stack() if not one.filename.startswith((str(HERE), "<"))]
            ours = [one for one in frames if "/torch/" not in one.filename][-1:]
            operators = [one for one in frames if "/torch/_dynamo/" not in one.filename][-1:]
            places = " <- ".join(dict.fromkeys(map(_place, [*operators, *ours])))
            self.places[f"{name}: {places}"] += 1


def _place(frame: traceback.FrameSummary) -> str:
    parts = Path(frame.filename).parts
    first = parts.index("site-packages") + 1 if "site-packages" in parts else len(HERE.parent.parts)
    return f"{'/'.join(parts[first:])}:{frame.lineno} {frame.name}"


def _address(tensor: Any) -> int:
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    local = getattr(local, "elem", local)  # of the result of a collective that has not been waited for
    try:
        return int(local.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # no storage: sparse, meta
        return 0


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the arguments that the operator changes in place."""
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(args[number] if number < len(args) else kwargs.get(argument.name))
    return written


class _Operators(TorchDispatchMode):
    """Follows the device's tensors through every operator, and counts those that wait.

    An operator on DTensors is one operator: what it does on the local tensors is not seen.
    """

    def __init__(self, owner: HostReads) -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = self._owner
        inputs = _tensors((args, kwargs))
        reads_device = any(map(owner.is_on_device, inputs))
        name = func.name().partition("::")[2].partition(".")[0]
        if reads_device and name in READS:
            owner.count(name)
        outputs = func(*args, **(kwargs or {}))
        if reads_device:
            owner.put_on_device(_written(func, args, kwargs or {}))
        for one in _tensors(outputs):
            if reads_device:
                owner.put_on_device([one])
            elif one.numel() and _address(one) not in map(_address, inputs):
                owner.take_off_device(one)  # new memory of the host, maybe where the device's was
        return outputs


class _Methods(TorchFunctionMode):
    """Counts copies to the host, which are no operators where the device is the CPU."""

    def __init__(self, owner: HostReads) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner, kwargs = self._owner, kwargs or {}
        name = getattr(func, "__name__", "")
        subject = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if subject is None or not owner.is_on_device(subject):
            result = func(*args, **kwargs)
            if name in FROM_HOST and isinstance(result, torch.Tensor):
                owner.take_off_device(result)
            return result
        if name == "to" and _goes_to_host(args, kwargs):
            owner.count("deferred" if kwargs.get("non_blocking") else "to(cpu)")
        elif name in TO_HOST:
            owner.count(name)
        else:
            return func(*args, **kwargs)
        copy = subject.detach().clone()
        owner.take_off_device(copy)
        return copy if name in ("to", "cpu") else func(copy, *args[1:], **kwargs)


def _goes_to_host(args: Any, kwargs: Any) -> bool:
    """Return whether the code names the CPU; the device of the rank, which is a CPU here, is a torch.device."""
    if not any(isinstance(one, str) and one.startswith("cpu") for one in [*args[1:], kwargs.get("device")]):
        return False
    frames = [one for one in traceback.extract_stack(limit=6) if not one.filename.startswith(str(HERE))]
    # DeepSpeed names the device of the rank by a string, which is "cpu" here.
    lines = [linecache.getline(frames[-1].filename, (frames[-1].lineno or 0) + ahead) for ahead in range(3)]
    return not any("get_accelerator()" in line for line in lines)
