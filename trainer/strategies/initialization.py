"""Recorded initializations of parameters, from which a whole parameter or a rank's part of it is made.

A `Recipe` holds the in-place operations that a constructor applied to a parameter (`strategies/deferred.py` records
them). Values that no operation can give again, such as `nn.Parameter(torch.randn(...))`, are kept: small ones on every
rank, large ones on one rank each, which broadcasts them when the parameter is sharded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.models.counter_init import fill_normal

_RECIPE = "_trainer_recipe"
_KEPT_BY_ALL_BYTES = 2**20
"""Tensors up to this size are kept on every rank: a broadcast of its own would cost more."""
_BY_ELEMENT = ("counter_normal_", "zero_", "fill_", "mul_", "add_", "sub_", "div_", "neg_", "clamp_")
"""In-place operations that, with numbers as arguments, treat each element alone: a part can be made by itself."""

View = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Function and arguments of an operation that returns a view of a parameter."""


@dataclass
class Kept:
    """A tensor of a constructor, in host memory of every rank or of one."""

    tensor: torch.Tensor
    """On the meta device on ranks that do not keep it."""
    owner: int | None
    """The rank that keeps it; None: all."""

    def value(self, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Return the tensor. Collective if it has an owner."""
        if self.owner is None:
            return self.tensor
        whole = torch.empty_like(self.tensor, device="cpu") if self.tensor.is_meta else self.tensor
        dist.broadcast(whole, src=self.owner, group=group)
        return whole


class Keeper:
    """Decides which rank keeps which tensor; the same on every rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._bytes = rank, [0] * world_size

    def keep(self, tensor: torch.Tensor) -> Kept:
        """Return a copy of the tensor, or a stand-in for it if another rank keeps it."""
        tensor = tensor.detach()
        if len(self._bytes) == 1 or tensor.nbytes <= _KEPT_BY_ALL_BYTES:
            return Kept(tensor.clone(), None)
        owner = self._bytes.index(min(self._bytes))
        self._bytes[owner] += tensor.nbytes
        return Kept(tensor.clone() if owner == self._rank else torch.empty_like(tensor, device="meta"), owner)


@dataclass
class Change:
    """One in-place operation on a parameter, or on a view of it."""

    views: list[View]
    """Operations that lead from the parameter to the part that is changed."""
    function: Any
    arguments: tuple[Any, ...]
    """Tensors among them are `Kept`."""
    named: dict[str, Any]
    random_state: torch.Tensor | None
    """State of the generator before a random operation; None for others."""

    def apply(self, part: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        """Repeat the operation on `part`, from the same state of the generator."""
        arguments = tuple(one.value(group) if isinstance(one, Kept) else one for one in self.arguments)
        named = dict(self.named)
        if self.random_state is not None and named.get("generator") is not None:
            named["generator"] = torch.Generator()
            named["generator"].set_state(self.random_state)
        elif self.random_state is not None:
            torch.set_rng_state(self.random_state)
        self.function(part, *arguments, **named)

    @property
    def name(self) -> str:
        """Name of the operation."""
        return str(getattr(self.function, "overloadpacket", self.function).__name__)


@dataclass
class Recipe:
    """The recorded initialization of one parameter."""

    parameter: nn.Parameter
    """On the meta device. The reference keeps its id and its storage from being reused."""
    start: Kept | None
    """Its values when it was assigned to its module; None if it was uninitialized."""
    changes: list[Change] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    """Type in which it was initialized; `module.to(bfloat16)` comes later."""
    source: Callable[[], torch.Tensor] | None = None
    """Reads the values from a file instead (`finetune.init_from`)."""

    @property
    def kept(self) -> list[Kept]:
        """The tensors that the recipe needs."""
        tensors = [] if self.start is None else [self.start]
        return tensors + [one for change in self.changes for one in change.arguments if isinstance(one, Kept)]

    @torch.no_grad()
    def make(self, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Return the initialized parameter, whole, in host memory. The state of the generators does not change.

        Args:
            group: A gloo group of all ranks, if a rank keeps values for the others: the call is collective then.
        """
        if self.source is not None:
            return self.source()
        like = self.parameter
        values = torch.empty_strided(like.shape, like.stride(), dtype=self.dtype)
        if self.start is not None:
            values.copy_(self.start.value(group))
        with torch.random.fork_rng(devices=[]):
            for change in self.changes:
                part = values
                for function, arguments, named in change.views:
                    part = function(part, *arguments, **named)
                change.apply(part, group)
        return values

    @torch.no_grad()
    def fill(self, part: torch.Tensor, offsets: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        """Write a rectangular part of the initialized parameter into `part`, on its device.

        If each element is initialized by itself, only the part is made; else the whole parameter, in host memory.

        Args:
            part: Filled in place.
            offsets: Index of its first element in the whole parameter.
            group: As for `make`.
        """
        if not self._is_by_element:
            slices = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
            part.copy_(self.make(group)[slices])
            return
        values = part if part.dtype == self.dtype else torch.empty_like(part, dtype=self.dtype)
        for change in self.changes:
            if change.name == "counter_normal_":
                mean, std, key = change.arguments
                fill_normal(values, mean, std, key, self.parameter.shape, offsets=offsets)
            else:
                change.function(values, *change.arguments, **change.named)
        if values is not part:
            part.copy_(values)

    @property
    def _is_by_element(self) -> bool:
        return (
            self.source is None
            and self.start is None
            and all(
                change.name in _BY_ELEMENT
                and not change.views
                and change.random_state is None
                and all(isinstance(one, (int, float)) for one in (*change.arguments, *change.named.values()))
                for change in self.changes
            )
        )

    def digest(self) -> str:
        """Return a digest that differs if two ranks would make different values."""
        found = hashlib.sha256()
        for kept in self.kept:
            if kept.owner is None:
                found.update(kept.tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for change in self.changes:
            numbers = [one for one in change.arguments if not isinstance(one, Kept)]
            named = {key: value for key, value in change.named.items() if key != "generator"}
            found.update(repr((change.name, numbers, named)).encode())
            if change.random_state is not None:
                found.update(change.random_state.numpy().tobytes())
        return found.hexdigest()

    def clear(self) -> None:
        """Free the kept values, once the parameter has been made."""
        self.start, self.source = None, None
        self.changes.clear()


def attach(recipe: Recipe) -> None:
    """Remember the recipe at its parameter."""
    setattr(recipe.parameter, _RECIPE, recipe)


def recipes(module: nn.Module) -> dict[str, Recipe]:
    """Return the recipes of a module's deferred parameters, under each of their names; empty if it was built whole."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: getattr(parameter, _RECIPE) for name, parameter in named if hasattr(parameter, _RECIPE)}


def are_equal_on_all_ranks(deferred: Mapping[str, Recipe], group: dist.ProcessGroup | None) -> bool:
    """Return whether all ranks would make the same values. Collective.

    Args:
        deferred: Recipes by name.
        group: A gloo group of all ranks; None for one rank.

    Raises:
        RuntimeError: The ranks have built different models.
    """
    if group is None:
        return True
    mine = list(deferred), [recipe.digest() for recipe in deferred.values()]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for rank, (names, _) in enumerate(found):
        if names != mine[0]:
            raise RuntimeError(f"rank {rank} has built another model than this rank: {sorted({*names} ^ {*mine[0]})}")
    return all(digests == mine[1] for _, digests in found)


def make_whole(module: nn.Module) -> None:
    """Initialize the deferred parameters of a module that is not sharded yet, in host memory.

    Collective if ranks keep values for each other, through the default process group.
    """
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
