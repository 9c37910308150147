"""Deferred initialization: build a model on the meta device, fill its parameters one by one after sharding.

This is for models too large for one rank. While the model is built, the initialization of each parameter is recorded
(`strategies/initialization.py`): every in-place operation on it. Each parameter can be initialized later, alone, with
exactly the bits that building the whole model would give it, and fsdp starts from the same weights as ddp.

What a rank then draws depends on the operations. The project's transformers draw from counters
(`models/counter_init.py`): a rank draws only its shards, on its device. torch's own generators are sequential: their
state is recorded before each operation, and the numbers are drawn and discarded, so that later operations see the
generator as if the values had been kept; to fill its shard, a rank makes that parameter whole, in host memory, and
frees it before the next.

Code that reads a parameter while the model is built gets its values, made for that one operation. Buffers are created
as usual. Some initializations cannot be recorded, such as an operation that writes to several parameters. `construct`
then builds the whole model on each rank and logs the reason.
"""

from __future__ import annotations

import logging
import operator
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from trainer.strategies.initialization import (
    Change,
    Keeper,
    Recipe,
    View,
    attach,
    make_whole,
    recipes,
    replace_parameters,
)

__all__ = ["CannotDefer", "Deferral", "Recipe", "construct", "make_whole", "recipes", "replace_parameters"]

log = logging.getLogger(__name__)
Built = TypeVar("Built")
OVERWRITES = ("normal_", "uniform_", "zero_", "fill_", "copy_", "counter_normal_")
"""In-place operations that overwrite all previous values."""


class CannotDefer(Exception):
    """The initialization of this model cannot be recorded."""


class Deferral:
    """Builds modules with their parameters on the meta device.

    Args:
        rank: This rank, which keeps some of the values that cannot be recorded.
        world_size: Number of ranks that build the same modules.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self._rank, self._world_size = rank, world_size
        self._recording: _Recording | None = None

    def construct(self, build: Callable[[], Built]) -> Built:
        """Return the result of `build`, with parameters on the meta device if their initialization can be recorded.

        Otherwise `build` is called a second time, from the same state of the random number generators.
        """
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self._recording = _Recording(Keeper(self._rank, self._world_size))
        try:
            with self.recording():
                return build()
        except Exception as error:
            # An error in the user's code, too: the second call raises it again, unchanged.
            log.info("building the whole model on each rank: %s: %s", type(error).__name__, error)
            self._recording = None
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            torch.set_rng_state(states[2])
            return build()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside this context what is done to deferred parameters; nothing if the model was built whole.

        Raises:
            CannotDefer: For an operation that cannot be recorded.
        """
        if self._recording is None:
            yield
            return
        with self._recording.parameters_recorded(), self._recording:
            yield


def construct(build: Callable[[], Built]) -> Built:
    """Return the result of `build`, deferred for this rank alone (`Deferral.construct`)."""
    return Deferral().construct(build)


class _Unfilled(nn.Parameter):
    """A meta parameter with `is_meta` False: torch.nn.init silently skips meta tensors."""

    is_meta = property(lambda self: False)


class _Recording(TorchDispatchMode):
    """Records the operations on parameters while a model is built."""

    def __init__(self, keeper: Keeper) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keeper = keeper
        self._fresh: dict[int, StorageWeakRef] = {}
        """Storages from `torch.empty` that nothing was written to, by address.

        A weak reference frees the values but not the address, which another storage could otherwise get.
        """
        self._assigned: dict[int, tuple[StorageWeakRef, weakref.ref[nn.Parameter], Recipe]] = {}
        """Storages of parameters that have been moved to the meta device, by address."""
        self._metas: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._known: dict[int, tuple[Recipe, list[View]]] = {}
        """id of a meta tensor to the recipe of its parameter and the views that lead to the tensor."""
        self._views: list[torch.Tensor] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def parameters_recorded(self) -> Iterator[None]:
        """Inside this context, move each parameter to the meta device when it is assigned to a module."""
        for recipe in self._recipes():
            recipe.parameter.__class__ = _Unfilled
        original = nn.Module.register_parameter

        def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            original(module, name, self._deferred(param))

        truncated = nn.init._no_grad_trunc_normal_

        def trunc_normal(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            if tensor.device.type == "meta":
                self._record(tensor, truncated, (tensor, *arguments), named, is_random=True)
                return tensor
            return truncated(tensor, *arguments, **named)

        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign,assignment]
        # torch 2.13 redraws until the values fit, which no single operation shows, and skips meta tensors.
        nn.init._no_grad_trunc_normal_ = trunc_normal
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]
            nn.init._no_grad_trunc_normal_ = truncated
            for recipe in self._recipes():
                recipe.parameter.__class__ = nn.Parameter

    def _recipes(self) -> list[Recipe]:
        return [recipe for recipe, views in self._known.values() if not views]

    def _deferred(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or type(parameter) is not nn.Parameter or parameter.device.type != "cpu":
            return parameter
        known: nn.Parameter | None = self._metas.get(parameter)  # type: ignore[no-untyped-call]
        if known is not None:
            return known
        empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        meta = _Unfilled(empty, requires_grad=parameter.requires_grad)
        storage = parameter.untyped_storage()
        start = None if storage._cdata in self._fresh else self._keeper.keep(parameter)
        recipe = Recipe(meta, start, dtype=parameter.dtype)
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._assigned[storage._cdata] = weak, weakref.ref(parameter), recipe
        self._metas[parameter] = meta
        self._known[id(meta)] = (recipe, [])
        attach(recipe)
        return meta

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if not any(map(_is_deferred, tensors)):
            return self._real(func, args, kwargs)
        first = args[0] if args else None
        written = _written(func, args, kwargs)
        if any(map(_is_deferred, written)):
            if len(written) != 1 or written[0] is not first:
                raise CannotDefer(f"{func} writes to several parameters")
            is_random = torch.Tag.nondeterministic_seeded in func.tags
            self._record(first, func, (first, *self._values(args[1:])), self._values(kwargs), is_random=is_random)
            return first if func._schema.returns else None
        if func.is_view and isinstance(first, torch.Tensor) and _is_deferred(first):
            return self._view(func, first, args[1:], kwargs)
        return self._real(func, self._values(args), self._values(kwargs))

    def _view(self, func: Any, tensor: torch.Tensor, arguments: Any, named: Any) -> Any:
        """Return a view of a deferred parameter, or several."""
        recipe, views = self._origin(tensor)
        result = func(tensor, *arguments, **named)
        step: View = (func, arguments, named)
        several = not isinstance(result, torch.Tensor)
        for index, view in enumerate(result if several else [result]):
            self._known[id(view)] = recipe, [*views, step, *([(operator.getitem, (index,), {})] if several else [])]
            self._views.append(view)
        return result

    def _values(self, arguments: Any) -> Any:
        """Return the arguments with deferred parameters replaced by their values, made for this operation."""
        return tree_map_only(torch.Tensor, lambda one: self._value(one) if _is_deferred(one) else one, arguments)

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        recipe, views = self._origin(tensor)
        if any(kept.owner is not None for kept in recipe.kept):
            raise CannotDefer("a parameter is read whose values another rank keeps")
        part = recipe.make()
        for function, arguments, named in views:
            part = function(part, *arguments, **named)
        return part

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on ordinary tensors, and keep track of which storages are still uninitialized."""
        written = [one.untyped_storage()._cdata for one in _written(func, args, kwargs) if _is_plain(one)]
        for address in written:
            self._fresh.pop(address, None)
        result = func(*args, **kwargs)
        for address in written:
            if address in self._assigned:
                self._refresh(*self._assigned[address][1:])
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided) and result.device.type != "meta":
            storage = result.untyped_storage()
            self._fresh[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return result

    def _refresh(self, parameter: weakref.ref[nn.Parameter], recipe: Recipe) -> None:
        """Take the values of a parameter that was written to, through another name, after it was assigned."""
        values = parameter()
        if values is None or recipe.changes:
            raise CannotDefer("a parameter is changed through two names")
        recipe.start = self._keeper.keep(values)

    def _origin(self, tensor: torch.Tensor) -> tuple[Recipe, list[View]]:
        """Return the recipe of the parameter that `tensor` is a view of, and the views that lead to it."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        for recipe, views in list(self._known.values()):  # `.data` is not dispatched, but shares the storage
            whole = recipe.parameter
            same = whole.untyped_storage()._cdata == tensor.untyped_storage()._cdata
            if not views and same and whole.shape == tensor.shape and whole.stride() == tensor.stride():
                return recipe, []
        raise CannotDefer("a tensor on the meta device is not a parameter")

    def _record(self, tensor: torch.Tensor, func: Any, args: Any, kwargs: Any, *, is_random: bool) -> None:
        """Add an in-place operation on `tensor` to the recipe of its parameter."""
        recipe, views = self._origin(tensor)
        state = None
        if is_random:
            generator = kwargs.get("generator")
            state = torch.get_rng_state() if generator is None else generator.get_state()
            # Draw and discard: later operations must see the generator as if the values had been kept.
            func(self._scratch_like(args[0]), *args[1:], **kwargs)
        arguments = tuple(self._keeper.keep(one) if isinstance(one, torch.Tensor) else one for one in args[1:])
        change = Change(views, func, arguments, dict(kwargs), state)
        if not views and change.name in OVERWRITES:
            recipe.start = None
            recipe.changes.clear()
        recipe.changes.append(change)

    def _scratch_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return memory for discarded values, shaped like `tensor`; it is reused each time.

        Small allocations that stay, between large ones that are freed, would keep the heap from shrinking: 1.0 GB for
        0.7 GB of parameters.
        """
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed_bytes = max(0, reach) * tensor.element_size()
        if self._scratch.numel() < needed_bytes:
            self._scratch = torch.empty(0, dtype=torch.uint8)
            self._scratch = torch.empty(needed_bytes, dtype=torch.uint8)
        return self._scratch[:needed_bytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _tensors(arguments: Any) -> list[torch.Tensor]:
    return [one for one in tree_flatten(arguments)[0] if isinstance(one, torch.Tensor)]


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return _tensors(found)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)


def _is_deferred(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"
