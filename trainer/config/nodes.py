"""What a `_target_` is called with: the meaning of a configuration's nodes, as `hydra.utils.instantiate` has it.

Nested targets are called first; lists and mappings arrive as ListConfig and DictConfig, or plain where `_convert_` says
so or where the target is of a library that knows nothing of OmegaConf (`_PLAIN`). `_recursive_: false` leaves the
nodes inside to the target. The interpolations have been resolved before.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainer.config.allow import DISCOVERY, require_allowed
from trainer.core.errors import UserError

ABOUT_THE_CALL = ("_target_", "_convert_", "_recursive_", "_partial_")
"""Keys of a node that are never arguments."""
CONVERSIONS = ("none", "partial", "object", "all")
"""What `_convert_` may be; nothing but `none` differs here from `all`, since there are no structured configs."""
_PLAIN = {"trainer", "torch", "torchvision", "torchaudio", "torchmetrics", "lightning", "pytorch_lightning"}
_PLAIN |= {"timm", "transformers", "peft", "deepspeed", "numpy"}
"""Packages whose functions take a list wherever they take a ListConfig, and some only a list."""

Locate = Callable[[str, str], Any]


def call(
    node: Mapping[str, Any],
    positional: tuple[Any, ...],
    extra: Mapping[str, Any],
    locate: Locate,
    where: str = "",
    convert: str = "none",
    recursive: bool = True,
) -> Any:
    """Call the target of `node`; `positional` comes before its `_args_`, `extra` wins over its arguments; both go as
    they are.

    `convert` and `recursive` are those of the node around it. Raises UserError for a target that cannot be called.
    """
    path, key = node.get("_target_"), f"{where}._target_" if where else "_target_"
    if not isinstance(path, str):
        raise UserError(f"{key} is missing", "name the class or function to call, such as my_package.MyModel")
    convert, recursive = node.get("_convert_", convert), node.get("_recursive_", recursive)
    target = _ours(locate(path, key), locate, key)
    plain = convert == "none" and "_convert_" not in node and path.partition(".")[0] in _PLAIN
    values = {}
    for name, value in node.items():
        if name in ABOUT_THE_CALL or name in extra:
            continue
        inner = f"{where}.{name}"
        if recursive:
            value = _value(value, convert, recursive, locate, inner)
        else:
            _require_allowed_inside(value, inner)
        values[name] = _converted(value, "all" if plain else convert)
    given = values.pop("_args_", None) or ()
    made = functools.partial(target, *positional, *given, **{**values, **extra})
    return made if node.get("_partial_") else made()


def _value(node: Any, convert: str, recursive: bool, locate: Locate, where: str) -> Any:
    if isinstance(node, Mapping):
        if "_target_" in node:
            return call(node, (), {}, locate, where, convert, recursive)
        convert, recursive = node.get("_convert_", convert), node.get("_recursive_", recursive)
        items: Any = {key: _value(item, convert, recursive, locate, f"{where}.{key}") for key, item in node.items()}
    elif isinstance(node, list):
        items = [_value(item, convert, recursive, locate, f"{where}[{i}]") for i, item in enumerate(node)]
    else:
        return node
    return _container(items) if _is_none(convert) else items


def _converted(value: Any, convert: str) -> Any:
    """An argument in the containers that the target is to get; what is no container stays as it is."""
    from omegaconf import OmegaConf

    if _is_none(convert):
        return _container(value) if type(value) in (dict, list) else value
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _is_none(convert: str) -> bool:
    return convert is None or str(convert).lower() == "none"


def _container(value: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(_escaped(value), flags={"allow_objects": True})


def _escaped(value: Any) -> Any:
    """A `${` that is in a frozen configuration is a text, and stays one in a container."""
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if type(value) is dict:
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if type(value) is list else value


def targets_inside(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Each `_target_` at any depth with its key."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield f"{where}._target_", value["_target_"]
        for key, item in value.items():
            yield from targets_inside(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from targets_inside(item, f"{where}[{i}]")


def _require_allowed_inside(value: Any, where: str) -> None:
    """The target may call what is in there, so that is refused as it would be here."""
    for key, path in targets_inside(value, where):
        require_allowed(path, key)


def _ours(target: Any, locate: Locate, key: str) -> Any:
    """`hydra.utils.get_class` and the like, which name another object, by our rules; others as they are."""
    origin = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if origin in DISCOVERY:
        return functools.partial(_discovered, kind=origin.rpartition("_")[2], locate=locate, key=key)
    return target


def _discovered(path: str, kind: str, locate: Locate, key: str) -> Any:
    found = locate(path, f"{key.removesuffix('._target_')}.path")
    if kind == "class" and not isinstance(found, type):
        raise UserError(f"{key.removesuffix('._target_')}.path={path}: this is not a class", "name a class")
    return found
