"""Objects from a frozen configuration: reading it back, and calling its `_target_` nodes.

The worker uses this instead of `hydra.utils.instantiate`, whose block list is too short (see `allow.py`) and which
wraps what a target raises; `nodes.py` has the same meaning of nodes.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.config.allow import OPEN_PATHS, require_allowed
from trainer.config.hydra_record import path_of
from trainer.config.namespaces import moved
from trainer.config.nodes import ABOUT_THE_CALL, call
from trainer.config.schema import Config
from trainer.core.errors import UserError

DIRECTIVES = (*ABOUT_THE_CALL, "_args_")
"""Keys of a node that are about the call, not arguments of it."""


def freeze(config: dict[str, Any]) -> str:
    """The YAML text of a checked, resolved configuration, in the order of the schema."""
    import yaml

    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)


def load(path: Path) -> Config:
    """Read a frozen `config.yaml`: closed sections as their dataclasses, open ones as plain dicts."""
    from trainer.config.typed import NAMED, OPEN, to_config

    plain = read_plain(path)
    try:
        config = to_config(plain)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}" if str(error) else "a value has a wrong type") from None
    if path.with_name("manifest.json").exists() and not path_of(path.parent).exists():
        # A run that was made before targets got the containers that Hydra gives them.
        for section in OPEN:
            node = getattr(config, section)
            for one in [one for one in node.values() if isinstance(one, dict)] if section in NAMED else [node]:
                one.setdefault("_convert_", "all")
    return config


def read_plain(path: Path) -> dict[str, Any]:
    """Read a frozen `config.yaml` as plain dicts, lists and scalars. Raises UserError where it is not one."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no keys")
    return found


def read_whole(path: Path) -> dict[str, Any]:
    """`read_plain` of a configuration that a job can be made from. Raises UserError where a section is missing."""
    from trainer.config.typed import REQUIRED

    found = read_plain(path)
    missing = [name for name in (*REQUIRED, "trainer", "resources") if name not in found]
    if missing:
        raise _damaged(path, f"it has no {', '.join(missing)}")
    return found


def _damaged(path: Path, why: object) -> UserError:
    said = str(why).strip().splitlines() or [type(why).__name__]
    fix = "restore it from a backup: it is written once, and nothing writes it again"
    return UserError(f"{path} cannot be read: {said[0]}", fix)


def instantiate(node: dict[str, Any], *args: Any, where: str = "", **extra: Any) -> Any:
    """Call the `_target_` of `node` as `hydra.utils.instantiate` does; `nodes.py` says with what.

    `args` come before the node's `_args_`; `extra` wins over its arguments; both go as they are. `where` is the
    node's key, for messages. Raises UserError when a target cannot be imported, or must not be (`allow.py`); what the
    target raises is raised as it is.
    """
    return call(node, args, extra, _located, where)


def locate(path: str, where: str = "_target_") -> Any:
    """Import what the dotted `path` names. Raises UserError when it is refused, missing or not callable."""
    found = _located(path, where)
    _require_callable(found, path, where)
    return found


def _located(path: str, where: str) -> Any:
    path = moved(path)
    require_allowed(path, where)
    found = _follow(path, where)
    # Refuses what the written path hides: mypkg.subprocess.run, mypkg.aliased_open.
    origin = getattr(found, "__module__", None) if callable(found) else None
    if isinstance(origin, str) and not path.startswith(origin):
        require_allowed(f"{origin}.{getattr(found, '__qualname__', '')}", where)
    if where.endswith("_target_"):
        _require_callable(found, path, where)
    return found


def _require_callable(found: Any, path: str, where: str) -> None:
    if not callable(found):
        raise UserError(f"{where}={path}: this is not a class or a function", "name one that can be called")


def accepts(target: Any, name: str) -> bool:
    """Whether the callable's signature names this argument; `**kwargs` does not."""
    try:
        parameter = inspect.signature(target).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


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
        if isinstance(found, ModuleType) and path not in OPEN_PATHS:
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
