"""Call the targets of configuration nodes with the meaning that `hydra.utils.instantiate` gives them.

Nested targets are called first. Lists and mappings arrive as ListConfig and DictConfig, or as plain containers if
`_convert_` says so or if the target belongs to a library that does not know OmegaConf (`_PLAIN`). `_recursive_: false`
leaves nested nodes to the target. Interpolations are already resolved.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.config.allow import argument_refusal
from trainer.config.allowed import DISCOVERY
from trainer.config.namespaces import canonical
from trainer.core.errors import UserError

ABOUT_THE_CALL = ("_target_", "_convert_", "_recursive_", "_partial_")
"""Keys of a node that control the call and are never passed to the target."""
CONVERSIONS = ("none", "partial", "object", "all")
"""Values of `_convert_`; only `none` differs from `all` here, since there are no structured configs."""
_PLAIN = {"trainer", "torch", "torchvision", "torchaudio", "torchmetrics", "lightning", "pytorch_lightning"}
_PLAIN |= {"timm", "transformers", "peft", "deepspeed", "numpy"}
"""Packages whose functions accept a list wherever they accept a ListConfig; some accept only a list."""

Locate = Callable[[str, str], Any]


@dataclass(frozen=True)
class NodeContext:
    """Position of a node, and the settings that it inherits from the nodes around it."""

    locate: Locate
    """Imports the object at a dotted path; the second argument is its key, for messages."""
    where: str = ""
    """Key of the node, for messages."""
    convert: str = "none"
    """Inherited `_convert_`."""
    recursive: bool = True
    """Inherited `_recursive_`."""

    def inside(self, suffix: str) -> NodeContext:
        """Return the context of an item of the node, such as `.optimizer` or `[0]`."""
        return replace(self, where=f"{self.where}{suffix}")

    def of(self, node: Mapping[str, Any]) -> NodeContext:
        """Return the context that the node passes on to its items."""
        convert, recursive = node.get("_convert_", self.convert), node.get("_recursive_", self.recursive)
        return replace(self, convert=convert, recursive=recursive)


def call(node: Mapping[str, Any], positional: tuple[Any, ...], extra: Mapping[str, Any], context: NodeContext) -> Any:
    """Call the target of `node`.

    Args:
        node: A node with a `_target_`.
        positional: Arguments before the node's `_args_`, passed unchanged.
        extra: Arguments that override those of the node, passed unchanged.
        context: Where the node is.

    Raises:
        UserError: The target is missing, cannot be called or is not allowed.
    """
    path, key = node.get("_target_"), f"{context.where}._target_" if context.where else "_target_"
    if not isinstance(path, str):
        raise UserError(f"{key} is missing", "name the class or function to call, such as my_package.MyModel")
    target = _checked(context.locate(path, key), context.locate, key)
    _require_arguments(path, {**node, **extra}, context.where, target)
    context = context.of(node)
    plain = context.convert == "none" and "_convert_" not in node and path.partition(".")[0] in _PLAIN
    arguments = {}
    for name, value in node.items():
        if name in ABOUT_THE_CALL or name in extra:
            continue
        if context.recursive:
            value = _value(value, context.inside(f".{name}"))
        else:
            _require_allowed_inside(value, f"{context.where}.{name}", context.locate)
        arguments[name] = _converted(value, "all" if plain else context.convert)
    args = arguments.pop("_args_", None) or ()
    bound = functools.partial(target, *positional, *args, **{**arguments, **extra})
    return bound if node.get("_partial_") else bound()


def _value(node: Any, context: NodeContext) -> Any:
    """Return a value with all targets in it called."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            return call(node, (), {}, context)
        context = context.of(node)
        items: Any = {key: _value(item, context.inside(f".{key}")) for key, item in node.items()}
    elif isinstance(node, list):
        items = [_value(item, context.inside(f"[{i}]")) for i, item in enumerate(node)]
    else:
        return node
    return _container(items) if _is_none(context.convert) else items


def _converted(value: Any, convert: str) -> Any:
    """Return an argument in the kind of container that the target expects; other values are unchanged."""
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
    """Escape `${`, which is plain text in a frozen configuration and must stay so in an OmegaConf container."""
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if type(value) is dict:
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if type(value) is list else value


def nodes_inside(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the key and the node of each `_target_` at any depth."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield where, value
        for key, item in value.items():
            yield from nodes_inside(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from nodes_inside(item, f"{where}[{i}]")


def _require_allowed_inside(value: Any, where: str, locate: Locate) -> None:
    """Refuse nested targets that are not allowed: with `_recursive_: false` the outer target may call them."""
    for key, node in nodes_inside(value, where):
        target = locate(node["_target_"], f"{key}._target_")
        _require_arguments(node["_target_"], node, key, target)
        if canonical(node["_target_"]) in DISCOVERY and isinstance(node.get("path"), str):
            locate(node["path"], f"{key}.path")


def _require_arguments(path: str, node: Mapping[str, Any], where: str, target: Any) -> None:
    function = getattr(target, "__func__", target)
    names = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    refused = argument_refusal(path, node, f"{names[0]}.{names[1]}" if all(names) else "")
    if refused is not None:
        key = f"{where}.{refused[0]}" if where else refused[0]
        raise refused[1].error(key, str(node.get(refused[0], "...")))


def _checked(target: Any, locate: Locate, key: str) -> Any:
    """Replace `hydra.utils.get_class` and the like, which import another object, by a version that checks its path."""
    origin = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if origin in DISCOVERY:
        return functools.partial(_discovered, kind=origin.rpartition("_")[2], locate=locate, key=key)
    return target


def _discovered(path: str, kind: str, locate: Locate, key: str) -> Any:
    target = locate(path, f"{key.removesuffix('._target_')}.path")
    if kind == "class" and not isinstance(target, type):
        raise UserError(f"{key.removesuffix('._target_')}.path={path}: this is not a class", "name a class")
    return target
