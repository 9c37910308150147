"""Optimizer state by parameter name instead of by number, so that any strategy can read a checkpoint.

`torch.optim` numbers parameters in the order in which they were passed to it. Sharding, flat buffers and wrappers
change which parameter a number means. They do not change the parameter's name in its module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

_T = TypeVar("_T")
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Prefixes that torch.compile and a user's activation checkpointing wrappers insert into names."""


def plain_name(name: str) -> str:
    """Return the name of a parameter without the parts that wrappers insert."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def plain_names(named: Mapping[str, _T]) -> dict[str, _T]:
    """Return `named` by plain names; unchanged if two names would become one, as of a layer also kept uncompiled."""
    plain = {plain_name(name): value for name, value in named.items()}
    return plain if len(plain) == len(named) else dict(named)


def fitted(state: Mapping[str, _T], names: Iterable[str]) -> Mapping[str, _T]:
    """Return a state dict under the `names` of a module, of which one may be wrapped and the other not.

    A module that calls torch.compile in `setup("fit")` is trained with other names than it is evaluated with.
    """
    names = set(names)
    if names == state.keys():
        return state
    by_plain = {plain_name(name): name for name in names if name not in state}
    return {name if name in names else by_plain.get(plain_name(name), name): value for name, value in state.items()}


def named_groups(optimizer: Any, module: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups with names under `params` and the options (lr, betas, ...) unchanged."""
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        # A parameter that is not registered in the module (kept in a list, for example) is named by its position.
        named = [names.get(id(one), f"{number}.{place}") for place, one in enumerate(group["params"])]
        groups.append({**group, "params": named})
    return groups


def by_name(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Return `torch.optim.Optimizer.state_dict()` with names instead of numbers.

    Args:
        state: The state dict; empty for Lightning's mock optimizer, which stands for no optimizer.
        names: Parameter names of each group, in order.
    """
    if not state:
        return {"state": {}, "param_groups": []}
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, [name for group in names for name in group], strict=True))
    groups = [{**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {name_of[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def by_number(state: dict[str, Any], optimizer: Any, module: nn.Module) -> dict[str, Any]:
    """Return the inverse of `by_name`, numbered for the present `optimizer`.

    A group's options come from the saved group that had its first parameter.
    """
    options = {name: group for group in state["param_groups"] for name in group["params"]}
    numbered: dict[str, Any] = {"state": {}, "param_groups": []}
    number = 0
    for group in named_groups(optimizer, module):
        numbers = []
        for name in group["params"]:
            if name in state["state"]:
                numbered["state"][number] = state["state"][name]
            numbers.append(number)
            number += 1
        saved = options.get(group["params"][0], group) if group["params"] else group
        numbered["param_groups"].append({**saved, "params": numbers})
    return numbered


def set_options(optimizer: Any, groups: list[dict[str, Any]], names: list[list[str]]) -> None:
    """Restore the saved options (lr, betas, initial_lr, ...) of an optimizer's groups, matched by parameter name.

    Args:
        optimizer: Changed in place.
        groups: Saved groups, with parameter names under `params`.
        names: Parameter names of each present group, in order.
    """
    options = {name: group for group in groups for name in group["params"]}
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        saved = options.get(group_names[0], {}) if group_names else {}
        for key, value in saved.items():
            if key in ("params", "fused", "foreach"):  # how to compute, which the present device decides
                continue
            current = group.get(key)
            if isinstance(current, torch.Tensor):
                current.fill_(float(value))
            else:
                group[key] = value
