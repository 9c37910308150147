"""Objects from a frozen configuration: reading it back, and calling its `_target_` nodes.

The worker uses this instead of `hydra.utils.instantiate`, whose block list is too short (see `allow.py`).
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.config.allow import require_allowed
from trainer.config.schema import Config
from trainer.errors import UserError

DIRECTIVES = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
"""Keys of a node that are about the call, not arguments of it."""


def freeze(config: dict[str, Any]) -> str:
    """The YAML text of a checked, resolved configuration, in the order of the schema."""
    import yaml

    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)


def load(path: Path) -> Config:
    """Read a frozen `config.yaml`: closed sections as their dataclasses, open ones as plain dicts."""
    from trainer.config.typed import to_config

    return to_config(read_plain(path))


def read_plain(path: Path) -> dict[str, Any]:
    """Read a frozen `config.yaml` as plain dicts, lists and scalars."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def instantiate(node: dict[str, Any], *args: Any, where: str = "", **extra: Any) -> Any:
    """Call the `_target_` of `node` with its arguments, nested nodes first; `extra` wins over the node's.

    `_partial_: true` gives a `functools.partial`, `_args_` positional arguments after `args`, and
    `_recursive_: false` leaves nested nodes to the target. `where` is the node's key, for messages.
    Raises UserError when the target cannot be imported, or must not be (`allow.py`).
    """
    key = f"{where}._target_" if where else "_target_"
    if not isinstance(node.get("_target_"), str):
        raise UserError(f"{key} is missing", "name the class or function to call, such as my_package.MyModel")
    target = locate(node["_target_"], key)
    values = {name: value for name, value in node.items() if name not in DIRECTIVES}
    positional = list(node.get("_args_") or [])
    if node.get("_recursive_", True):
        values = {name: _nested(value, f"{where}.{name}") for name, value in values.items()}
        positional = [_nested(value, f"{where}._args_") for value in positional]
    call = functools.partial(target, *args, *positional, **{**values, **extra})
    return call if node.get("_partial_") else call()


def locate(path: str, where: str = "_target_") -> Any:
    """Import what the dotted `path` names. Raises UserError when it is refused, missing or not callable."""
    require_allowed(path, where)
    found = _follow(path, where)
    if not callable(found):
        raise UserError(f"{where}={path}: this is not a class or a function", "name one that can be called")
    # Refuses what the written path hides: mypkg.subprocess.run, mypkg.aliased_open.
    origin = getattr(found, "__module__", None)
    if isinstance(origin, str) and not path.startswith(origin):
        require_allowed(f"{origin}.{getattr(found, '__qualname__', '')}", where)
    return found


def accepts(target: Any, name: str) -> bool:
    """Whether the callable's signature names this argument; `**kwargs` does not."""
    try:
        parameter = inspect.signature(target).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _nested(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        if value.get("_target_"):
            return instantiate(value, where=where)
        return {key: _nested(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_nested(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return value


def _follow(path: str, where: str) -> Any:
    parts = path.split(".")
    found = _import_top(parts[0], path, where)
    for i, part in enumerate(parts[1:], start=1):
        dotted = ".".join(parts[: i + 1])
        if not hasattr(found, part) and isinstance(found, ModuleType):
            _import_inner(dotted, path, where)
        if not hasattr(found, part):
            raise UserError(f"{where}={path}: {'.'.join(parts[:i])} has no {part}", "check the spelling")
        found = getattr(found, part)
        if isinstance(found, ModuleType):
            require_allowed(found.__name__, where)
    return found


def _import_top(name: str, path: str, where: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        fix = f"install it, or run where the folder {name} is"
        raise UserError(f"{where}={path}: no module named {name}", fix) from None


def _import_inner(dotted: str, path: str, where: str) -> None:
    try:
        import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name != dotted:
            raise
        parent = dotted.rpartition(".")[0]
        raise UserError(f"{where}={path}: there is no {dotted}", f"check the names in {parent}") from None
