"""Optimizer state by parameter name instead of by number: what lets a checkpoint move between strategies.

`torch.optim` numbers parameters in the order in which it got them; shards, flat buffers and other wrappings change
what a number means, but not the name of a parameter in its module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and checkpoint wrappers of a user put into names."""


def plain_name(name: str) -> str:
    """The name of a parameter as it would be without wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_groups(optimizer: Any, module: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups with names under `params`; the options (lr, betas, ...) as they are."""
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        # One that the module does not have (kept in a list, say) is known by its place alone.
        named = [names.get(id(one), f"{number}.{place}") for place, one in enumerate(group["params"])]
        groups.append({**group, "params": named})
    return groups


def by_name(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """`torch.optim.Optimizer.state_dict()` with names (of each group, in order) instead of numbers.

    Empty for the state of Lightning's stand-in for no optimizer.
    """
    if not state:
        return {"state": {}, "param_groups": []}
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, [name for group in names for name in group], strict=True))
    groups = [{**group, "params": [of_number[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {of_number[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def by_number(state: dict[str, Any], optimizer: Any, module: nn.Module) -> dict[str, Any]:
    """The inverse of `by_name`, for the optimizer that is there now; options come from the group that had the name."""
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
    """Put the saved options (lr, betas, initial_lr, ...) into the groups of an optimizer, matched by parameter name."""
    options = {name: group for group in groups for name in group["params"]}
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        saved = options.get(group_names[0], {}) if group_names else {}
        for key, value in saved.items():
            if key == "params":
                continue
            current = group.get(key)
            if isinstance(current, torch.Tensor):
                current.fill_(float(value))
            else:
                group[key] = value
