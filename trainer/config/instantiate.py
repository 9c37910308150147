"""Read a frozen configuration, and instantiate its `_target_` nodes.

The ranks use this instead of `hydra.utils.instantiate`, which calls almost everything (see `allow.py`) and wraps the
exceptions of a target. `nodes.py` gives nodes the same meaning as Hydra does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.config import allow, allow_objects, yaml_limits
from trainer.config.hydra_record import path_of
from trainer.config.namespaces import canonical, moved
from trainer.config.nodes import ABOUT_THE_CALL, NodeContext, call
from trainer.config.schema import Config
from trainer.core.errors import UserError

DIRECTIVES = (*ABOUT_THE_CALL, "_args_")
"""Keys of a node that control the call and are not arguments of the target."""


def freeze(config: dict[str, Any]) -> str:
    """Return a checked, resolved configuration as YAML, in the order of the schema."""
    import yaml

    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
    return text


def load(path: Path) -> Config:
    """Read a frozen `config.yaml`: closed sections as dataclasses, open ones as plain dicts.

    Raises:
        UserError: The file cannot be read.
    """
    from trainer.config.typed import NAMED, OPEN, to_config

    plain = read_plain(path)
    try:
        config = to_config(plain)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        cause = f"{type(error).__name__}: {error}" if str(error) else "a value has a wrong type"
        raise _damaged(path, cause) from None
    if path.with_name("manifest.json").exists() and not path_of(path.parent).exists():
        # The run was made when targets still got plain containers, unlike in Hydra.
        for section in OPEN:
            node = getattr(config, section)
            for one in [one for one in node.values() if isinstance(one, dict)] if section in NAMED else [node]:
                one.setdefault("_convert_", "all")
    trust(config.security.allow)
    return config


def read_plain(path: Path) -> dict[str, Any]:
    """Read a frozen `config.yaml` as plain dicts, lists and scalars.

    Raises:
        UserError: The file cannot be read, or holds no keys.
    """
    import yaml

    try:
        content = yaml_limits.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no keys")
    return content


def read_whole(path: Path) -> dict[str, Any]:
    """Read a frozen `config.yaml` from which a job can be launched again.

    Raises:
        UserError: The file cannot be read, or a required section is missing.
    """
    from trainer.config.typed import REQUIRED

    config = read_plain(path)
    missing = [name for name in (*REQUIRED, "trainer", "resources") if name not in config]
    if missing:
        raise _damaged(path, f"it has no {', '.join(missing)}")
    return config


def _damaged(path: Path, cause: object) -> UserError:
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    fix = "restore it from a backup: it is written once, and nothing writes it again"
    return UserError(f"{path} cannot be read: {lines[0]}", fix)


def instantiate(node: dict[str, Any], *args: Any, where: str = "", **extra: Any) -> Any:
    """Call the `_target_` of `node` as `hydra.utils.instantiate` does. Exceptions of the target are not wrapped.

    Args:
        node: A node of the configuration with a `_target_`.
        *args: Positional arguments before the node's `_args_`, passed unchanged.
        where: Key of the node, for messages.
        **extra: Arguments that override those of the node, passed unchanged.

    Raises:
        UserError: A target cannot be imported, or is not allowed (`allow.py`).
    """
    return call(node, args, extra, NodeContext(_located, where))


_trusted: tuple[str, ...] = ()
"""`security.allow` of the job of this process."""


def trust(names: Sequence[str]) -> None:
    """Set `security.allow` for the targets that this process calls."""
    global _trusted
    _trusted = tuple(canonical(name) for name in names)


def locate(path: str, where: str = "_target_") -> Any:
    """Import the class or function at the dotted `path`; `where` is its key, for messages.

    Raises:
        UserError: It is not allowed, does not exist or cannot be called.
    """
    target = _located(path, where)
    _require_callable(target, path, where)
    return target


def _located(path: str, where: str) -> Any:
    path, cwd = moved(path), Path.cwd()
    refused = allow.refusal(path, where, cwd, _trusted)
    refused = refused or (allow.discovery_refusal(path) if where.endswith(".path") else None)
    if refused is not None:
        raise refused.error(where, path, _trusted)
    target, holder = _follow(path, where)
    refused = allow_objects.refusal(target, allow_objects.Named(path, where, holder), cwd, _trusted)
    if refused is not None:
        raise refused.error(where, path, _trusted)
    if where.endswith("_target_"):
        _require_callable(target, path, where)
    return target


def _require_callable(target: Any, path: str, where: str) -> None:
    if not callable(target):
        raise UserError(f"{where}={path}: this is not a class or a function", "name one that can be called")


def accepts(target: Any, name: str) -> bool:
    """Return whether the callable's signature has an argument of this name; `**kwargs` does not count."""
    try:
        parameter = inspect.signature(target).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _follow(path: str, where: str) -> tuple[Any, ModuleType]:
    """Import the first part of the path, and get each further part as an attribute or a submodule.

    Returns:
        The object, and the last module on the way to it.
    """
    parts = path.split(".")
    current = _import_top(parts[0], path, where)
    holder: ModuleType = current
    for i, part in enumerate(parts[1:], start=1):
        dotted = ".".join(parts[: i + 1])
        if not hasattr(current, part) and isinstance(current, ModuleType):
            _import_inner(dotted, path, where)
        if not hasattr(current, part):
            raise UserError(f"{where}={path}: {'.'.join(parts[:i])} has no {part}", "check the spelling")
        current = getattr(current, part)
        if isinstance(current, ModuleType):
            if not allow_objects.passes_through(current, Path.cwd(), _trusted):
                raise allow.refused(current.__name__, "").error(where, path)
            holder = current
    return current, holder


def _import_top(name: str, path: str, where: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        fix = f"install it, or run trainer in the directory that holds {name}"
        raise UserError(f"{where}={path}: no module named {name}", fix) from None


def _import_inner(dotted: str, path: str, where: str) -> None:
    try:
        import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name != dotted:
            raise
        parent = dotted.rpartition(".")[0]
        raise UserError(f"{where}={path}: {dotted} does not exist", f"check the names in {parent}") from None
