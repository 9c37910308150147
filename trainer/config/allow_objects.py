"""Judge the targets of a configuration again on the imported objects, before they are called.

Source text does not show every name. An object is judged by the module that defines it, and a class by its base
classes, with the rules of `allowed.py`.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.config import allow, allowed
from trainer.config.allow import Refusal
from trainer.config.namespaces import canonical
from trainer.config.sources import Module, is_users

_SCALARS = (bool, int, float, complex, str, bytes, enum.Enum, type(None), tuple, list, dict, frozenset, set)
"""Types of objects for `hydra.utils.get_object` that cannot be called."""


@dataclass(frozen=True)
class Named:
    """How a configuration names an object."""

    path: str
    """Dotted path, as written."""
    key: str
    """Its key in the configuration."""
    holder: Any
    """The module or class that the object was taken from."""


def refusal(target: Any, named: Named, cwd: Path, trusted: Sequence[str]) -> Refusal | None:
    """Return why an imported object must not be called; None if it may be.

    Args:
        target: The object.
        named: How the configuration names it.
        cwd: Directory that is searched first.
        trusted: `security.allow`.
    """
    written, section = canonical(named.path), allow.section_of(named.key)
    if written in trusted or allowed.is_named(written, section) or (not section and _is_named(target)):
        return None
    if isinstance(target, functools.partial):
        return refusal(target.func, named, cwd, trusted)
    name = _definition(target)
    if name is None:
        return None if _is_value(target, named, cwd, trusted) else allow.refused(written, section)
    module, qualified = name
    defined = canonical(f"{module}.{qualified}")
    if allowed.under(defined, trusted) or _is_of_user(module, cwd):
        return None
    if isinstance(target, type):
        bases = {canonical(f"{base.__module__}.{base.__qualname__}") for base in target.__mro__}
        kinds = {allowed.KINDS[base] for base in bases if base in allowed.KINDS}
        return allow.of_class(defined, kinds, section)
    if allowed.is_function(defined, section) or allowed.is_builder(defined):
        return None
    # A class method that a subclass outside of its own package inherits: transformers' `from_pretrained` in peft.
    owner = getattr(target, "__self__", None)
    if isinstance(owner, type) and allowed.is_builder(
        canonical(f"{owner.__module__}.{owner.__qualname__}.{qualified}")
    ):
        return None
    return allow.refused(defined, section)


def passes_through(module: ModuleType, cwd: Path, trusted: Sequence[str]) -> bool:
    """Return whether a dotted path may lead through `module`: into the user's code or a package of `allowed.py`."""
    name = canonical(module.__name__)
    if name.partition(".")[0] in allowed.PACKAGES or _is_of_user(name, cwd):
        return True
    return any(allowed.under(one, [name]) or allowed.under(name, [one]) for one in (*trusted, *allowed.FUNCTIONS))


def _definition(target: Any) -> tuple[str, str] | None:
    """Return the module and the qualified name of the definition of a class, a function or a method."""
    function = getattr(target, "__func__", target)
    qualified = getattr(function, "__qualname__", None)
    if not isinstance(qualified, str) or not callable(target):
        return None
    module = getattr(function, "__module__", None)
    owner = getattr(target, "__objclass__", None) or getattr(target, "__self__", None)
    if module is None and isinstance(owner, (type, ModuleType)):  # of an extension module
        module = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    return (module, qualified) if isinstance(module, str) else None


def _is_value(target: Any, named: Named, cwd: Path, trusted: Sequence[str]) -> bool:
    """Return whether an object that is neither a class nor a function may be used: a value, or an instance."""
    where = named.holder.__name__ if isinstance(named.holder, ModuleType) else ""
    if _is_of_user(where, cwd) or allowed.under(canonical(where), trusted):
        kind = _definition(type(target))
        package = canonical(kind[0]).partition(".")[0] if kind else ""
        if isinstance(target, _SCALARS) or package in (*allowed.PACKAGES, "numpy"):
            return True
        return kind is not None and (_is_of_user(kind[0], cwd) or allowed.under(kind[0], trusted))
    return (
        isinstance(target, _SCALARS) and not isinstance(target, dict) and allowed.holds_classes(canonical(named.path))
    )


def _is_of_user(name: str, cwd: Path) -> bool:
    if not name or name.partition(".")[0] in allowed.PACKAGES:
        return False
    module = sys.modules.get(name)
    if module is None:
        return False
    file = getattr(module, "__file__", None)
    inside = tuple(getattr(module, "__path__", ()))
    if name == "__main__" or (file is None and not inside):
        return False
    return is_users(Module(name, Path(file) if file else None, inside), cwd)


def _is_named(target: Any) -> bool:
    """Return whether this is an object of `allowed.FUNCTIONS` under another name, such as a function of torch._C."""
    return callable(target) and id(target) in _named_objects(sum(name in sys.modules for name in _LIBRARIES))


_LIBRARIES = ("torch", "numpy")


@functools.cache
def _named_objects(loaded: int) -> dict[int, Any]:
    """Return the imported objects of `allowed.FUNCTIONS` by id; `loaded` is the number of imported `_LIBRARIES`."""
    named: dict[int, Any] = {}
    for path in allowed.FUNCTIONS if loaded else ():
        top, *names = path.split(".")
        target: Any = sys.modules.get(top) if top in _LIBRARIES else None
        for name in names:
            target = getattr(target, name, None)
        if target is not None:
            named[id(target)] = target
    return named
