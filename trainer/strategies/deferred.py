"""Models too large for one rank: built with parameters on the meta device, filled one by one after they are sharded.

How parameters are initialised is written down while the model is built: each in-place operation on one, with the
state of the random number generator before it. So each parameter can be made later, alone, with the very bits that
building the whole model would have given it, and fsdp starts from the weights that ddp starts from. The price: random
numbers are drawn twice, and a rank holds one whole parameter at a time instead of all.

Buffers are made as always. What cannot be written down (a parameter computed from another, read while the model is
built, initialised after it was assigned to two places) makes `construct` build the model whole, and say so.
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
"""Operations after which nothing is left of what was there."""
_RECIPE = "_trainer_recipe"


class CannotDefer(Exception):
    """The initialisation of this model cannot be written down."""


@dataclass
class _Change:
    views: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    """Which part of the parameter is changed."""
    function: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    random_state: torch.Tensor | None
    """Of the CPU generator before a random operation."""


@dataclass
class Recipe:
    """How to make the values of one parameter."""

    parameter: nn.Parameter
    """On the meta device; kept so that its id and its storage stay its own."""
    start: torch.Tensor | None
    """What it held when it was assigned to its module, where it came with values."""
    changes: list[_Change] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    """In which it was initialised; `module.to(bfloat16)` comes later."""

    @torch.no_grad()
    def make(self) -> torch.Tensor:
        """The whole parameter in host memory. The generators are left as they are."""
        like = self.parameter
        if self.start is not None:
            made = self.start.clone()
        else:
            made = torch.empty_strided(like.shape, like.stride(), dtype=self.dtype)
        with torch.random.fork_rng(devices=[]):
            for change in self.changes:
                part = made
                for function, arguments, named in change.views:
                    part = function(part, *arguments, **named)
                if change.random_state is not None:
                    torch.set_rng_state(change.random_state)
                change.function(part, *change.arguments, **change.named)
        return made


def construct(build: Callable[[], Built]) -> Built:
    """What `build` returns, its parameters on the meta device if their initialisation can be written down."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        with _Recording() as recording, recording.parameters_recorded():
            return build()
    except Exception as error:
        # Also a mistake of the user's, which the second attempt raises again as it is.
        log.info("the model is built whole on each rank: %s: %s", type(error).__name__, error)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return build()


def recipes(module: nn.Module) -> dict[str, Recipe]:
    """The recipes of a module's parameters, by each of their names; empty for one that was built whole."""
    found = module.named_parameters(remove_duplicate=False)
    return {name: getattr(parameter, _RECIPE) for name, parameter in found if hasattr(parameter, _RECIPE)}


def make_whole(module: nn.Module) -> None:
    """Fill the parameters of a module that is not sharded yet."""
    made = {
        id(one): nn.Parameter(getattr(one, _RECIPE).make().to(one.dtype), one.requires_grad)
        for one in module.parameters()
        if hasattr(one, _RECIPE)
    }
    replace_parameters(module, made)


def replace_parameters(module: nn.Module, replacements: dict[int, nn.Parameter]) -> None:
    """By id of the present ones, wherever each is: what is tied stays tied."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in replacements:
                part._parameters[name] = replacements[id(parameter)]


class _Unfilled(nn.Parameter):
    """A parameter on the meta device that denies it: torch.nn.init would do nothing, and not say so."""

    is_meta = property(lambda self: False)  # type: ignore[assignment]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._fresh: dict[int, StorageWeakRef] = {}
        """Storages from `torch.empty` that nothing was written to, by address; a weak reference lets the values go
        but not the address, which would otherwise come back as that of another storage."""
        self._assigned: dict[int, StorageWeakRef] = {}
        """Storages of parameters that are on the meta device by now: who changes one changes it in vain."""
        self._metas: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._known: dict[int, tuple[Recipe, list[Any]]] = {}
        """By id of a meta tensor: what it is part of, and through which views."""
        self._views: list[torch.Tensor] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def parameters_recorded(self) -> Iterator[None]:
        original = nn.Module.register_parameter

        def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            original(module, name, self._deferred(param))

        truncated = nn.init._no_grad_trunc_normal_

        def trunc_normal(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            if tensor.device.type == "meta":
                recipe, views = self._what(tensor)
                self._write_down(recipe, views, truncated, (tensor, *arguments), named, is_random=True)
                return tensor
            return truncated(tensor, *arguments, **named)

        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign,assignment]
        # torch 2.13's draws until it fits, which no single operation tells, and does nothing on the meta device
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
        if parameter in self._metas:
            return self._metas[parameter]
        empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        meta = _Unfilled(empty, requires_grad=parameter.requires_grad)
        storage = parameter.untyped_storage()
        start = None if storage._cdata in self._fresh else parameter.detach().clone()
        recipe = Recipe(meta, start, dtype=parameter.dtype)
        self._assigned[storage._cdata] = StorageWeakRef(storage)
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
        recipe, views = self._what(metas[0])
        if func._schema.is_mutable:
            is_random = torch.Tag.nondeterministic_seeded in func.tags
            self._write_down(recipe, views, func, args, kwargs, is_random)
            return args[0]
        if not func.is_view:
            raise CannotDefer(f"{func} reads a parameter")
        found = func(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            self._known[id(found)] = (recipe, [*views, (func, args[1:], kwargs)])
            self._views.append(found)
        return found

    def _real(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """An operation on ordinary tensors, after which it is known which storages are still untouched."""
        if func._schema.is_mutable:
            for one in inputs:
                if one.untyped_storage()._cdata in self._assigned:
                    raise CannotDefer(f"{func} on a parameter after it was assigned to its module")
                self._fresh.pop(one.untyped_storage()._cdata, None)
        found = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided) and found.device.type != "meta":
            storage = found.untyped_storage()
            self._fresh[storage._cdata] = StorageWeakRef(storage)
        return found

    def _what(self, tensor: torch.Tensor) -> tuple[Recipe, list[Any]]:
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        for recipe, views in self._known.values():  # `.data`, which is not dispatched, shares the storage
            whole = recipe.parameter
            same = whole.untyped_storage()._cdata == tensor.untyped_storage()._cdata
            if not views and same and whole.shape == tensor.shape and whole.stride() == tensor.stride():
                return recipe, []
        raise CannotDefer("a tensor on the meta device that is no parameter")

    def _write_down(self, recipe: Recipe, views: list[Any], func: Any, args: Any, kwargs: Any, is_random: bool) -> None:
        state = None
        if is_random:
            state = torch.get_rng_state()
            # Drawn and thrown away: what comes after must see the generator as if it had been kept.
            func(self._scratch_like(args[0]), *args[1:], **kwargs)
        arguments = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in args[1:])
        if not views and getattr(func, "overloadpacket", func).__name__ in OVERWRITES:
            recipe.start = None
            recipe.changes.clear()
        recipe.changes.append(_Change(views, func, arguments, dict(kwargs), state))

    def _scratch_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for what is thrown away, the same each time: small things that stay, allocated between large ones
        that go, would keep the heap from shrinking (1.0 GB for 0.7 GB of parameters)."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed_bytes = max(0, reach) * tensor.element_size()
        if self._scratch.numel() < needed_bytes:
            self._scratch = torch.empty(0, dtype=torch.uint8)
            self._scratch = torch.empty(needed_bytes, dtype=torch.uint8)
        return self._scratch[:needed_bytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
