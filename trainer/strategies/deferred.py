"""Deferred initialization: build a model on the meta device, fill its parameters one by one after sharding.

This is for models too large for one rank. While the model is built, the initialization of each parameter is recorded:
every in-place operation on it, with the state of the random number generator before it. So each parameter can be
initialized later, alone, with exactly the bits that building the whole model would give it, and fsdp starts from the
same weights as ddp. The cost: random numbers are drawn twice. A rank holds one whole parameter at a time, not all.

Buffers are created as usual. Some initializations cannot be recorded: a parameter that is computed from another, is
read while the model is built, or is initialized after it was assigned to two places. `construct` then builds the whole
model on each rank and logs the reason.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger(__name__)
Built = TypeVar("Built")
OVERWRITES = ("normal_", "uniform_", "zero_", "fill_", "copy_")
"""In-place operations that overwrite all previous values."""
_RECIPE = "_trainer_recipe"


class CannotDefer(Exception):
    """The initialization of this model cannot be recorded."""


View = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Function and arguments of an operation that returns a view of a parameter."""


@dataclass
class _Change:
    """One in-place operation on a parameter, or on a view of it."""

    views: list[View]
    """Operations that lead from the parameter to the part that is changed."""
    function: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    random_state: torch.Tensor | None
    """State of the CPU generator before a random operation; None for others."""


@dataclass
class Recipe:
    """The recorded initialization of one parameter."""

    parameter: nn.Parameter
    """On the meta device. The reference keeps its id and its storage from being reused."""
    start: torch.Tensor | None
    """Its values when it was assigned to its module; None if it was uninitialized."""
    changes: list[_Change] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    """Type in which it was initialized; `module.to(bfloat16)` comes later."""

    @torch.no_grad()
    def make(self) -> torch.Tensor:
        """Return the initialized parameter, whole, in host memory. The state of the generators does not change."""
        like = self.parameter
        if self.start is not None:
            values = self.start.clone()
        else:
            values = torch.empty_strided(like.shape, like.stride(), dtype=self.dtype)
        with torch.random.fork_rng(devices=[]):
            for change in self.changes:
                part = values
                for function, arguments, named in change.views:
                    part = function(part, *arguments, **named)
                if change.random_state is not None:
                    torch.set_rng_state(change.random_state)
                change.function(part, *change.arguments, **change.named)
        return values


def construct(build: Callable[[], Built]) -> Built:
    """Return the result of `build`, with parameters on the meta device if their initialization can be recorded.

    Otherwise `build` is called a second time, from the same state of the random number generators.
    """
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        with _Recording() as recording, recording.parameters_recorded():
            return build()
    except Exception as error:
        # An error in the user's code, too: the second call raises it again, unchanged.
        log.info("building the whole model on each rank: %s: %s", type(error).__name__, error)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return build()


def recipes(module: nn.Module) -> dict[str, Recipe]:
    """Return the recipes of a module's deferred parameters, under each of their names; empty if it was built whole."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: getattr(parameter, _RECIPE) for name, parameter in named if hasattr(parameter, _RECIPE)}


def make_whole(module: nn.Module) -> None:
    """Initialize the deferred parameters of a module that is not sharded yet, in host memory."""
    initialized = {
        id(one): nn.Parameter(getattr(one, _RECIPE).make().to(one.dtype), one.requires_grad)
        for one in module.parameters()
        if hasattr(one, _RECIPE)
    }
    replace_parameters(module, initialized)


def replace_parameters(module: nn.Module, replacements: dict[int, nn.Parameter]) -> None:
    """Replace parameters wherever they are used, so that tied ones stay tied.

    Args:
        module: Changed in place.
        replacements: id of a present parameter to the new one.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in replacements:
                part._parameters[name] = replacements[id(parameter)]


class _Unfilled(nn.Parameter):
    """A meta parameter with `is_meta` False: torch.nn.init silently skips meta tensors."""

    is_meta = property(lambda self: False)


class _Recording(TorchDispatchMode):
    """Records the operations on parameters while a model is built."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fresh: dict[int, StorageWeakRef] = {}
        """Storages from `torch.empty` that nothing was written to, by address.

        A weak reference frees the values but not the address, which another storage could otherwise get.
        """
        self._assigned: dict[int, StorageWeakRef] = {}
        """Storages of parameters that have been moved to the meta device: changes to these would be lost."""
        self._metas: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._known: dict[int, tuple[Recipe, list[View]]] = {}
        """id of a meta tensor to the recipe of its parameter and the views that lead to the tensor."""
        self._views: list[torch.Tensor] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def parameters_recorded(self) -> Iterator[None]:
        """Inside this context, move each parameter to the meta device when it is assigned to a module."""
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
            for recipe, _ in self._known.values():
                recipe.parameter.__class__ = nn.Parameter

    def _deferred(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or type(parameter) is not nn.Parameter or parameter.device.type != "cpu":
            return parameter
        known: nn.Parameter | None = self._metas.get(parameter)  # type: ignore[no-untyped-call]
        if known is not None:
            return known
        empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        meta = _Unfilled(empty, requires_grad=parameter.requires_grad)
        storage = parameter.untyped_storage()
        start = None if storage._cdata in self._fresh else parameter.detach().clone()
        recipe = Recipe(meta, start, dtype=parameter.dtype)
        self._assigned[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._metas[parameter] = meta
        self._known[id(meta)] = (recipe, [])
        setattr(meta, _RECIPE, recipe)
        return meta

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        metas = [one for one in tensors if one.device.type == "meta"]
        if not metas:
            return self._real(func, args, kwargs, tensors)
        if len(metas) > 1 or metas[0] is not args[0]:
            raise CannotDefer(f"{func} combines parameters")
        recipe, views = self._origin(metas[0])
        if func._schema.is_mutable:
            is_random = torch.Tag.nondeterministic_seeded in func.tags
            self._record(metas[0], func, args, kwargs, is_random=is_random)
            return args[0]
        if not func.is_view:
            raise CannotDefer(f"{func} reads a parameter")
        view = func(*args, **kwargs)
        if isinstance(view, torch.Tensor):
            self._known[id(view)] = (recipe, [*views, (func, args[1:], kwargs)])
            self._views.append(view)
        return view

    def _real(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """Run an operation on ordinary tensors, and keep track of which storages are still uninitialized."""
        if func._schema.is_mutable:
            for one in inputs:
                if one.untyped_storage()._cdata in self._assigned:
                    raise CannotDefer(f"{func} on a parameter after it was assigned to its module")
                self._fresh.pop(one.untyped_storage()._cdata, None)
        result = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided) and result.device.type != "meta":
            storage = result.untyped_storage()
            self._fresh[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return result

    def _origin(self, tensor: torch.Tensor) -> tuple[Recipe, list[View]]:
        """Return the recipe of the parameter that `tensor` is a view of, and the views that lead to it."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        for recipe, views in self._known.values():  # `.data` is not dispatched, but shares the storage
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
            state = torch.get_rng_state()
            # Draw and discard: later operations must see the generator as if the values had been kept.
            func(self._scratch_like(args[0]), *args[1:], **kwargs)
        arguments = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in args[1:])
        if not views and getattr(func, "overloadpacket", func).__name__ in OVERWRITES:
            recipe.start = None
            recipe.changes.clear()
        recipe.changes.append(_Change(views, func, arguments, dict(kwargs), state))

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
