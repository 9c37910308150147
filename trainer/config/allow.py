"""Judge the targets of a configuration by where they are defined, from source text.

People exchange config files as data, but a `_target_` is called. The user's own modules may be named without limits,
and so may what `security.allow` lists. Of installed packages only what `allowed.py` lists may be named. The rules hold
for nested targets, too, and for the path that is given to `hydra.utils.get_method` and the like.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trainer.config import allowed
from trainer.config.namespaces import canonical
from trainer.config.problems import NotAllowed
from trainer.config.sources import (
    Definition,
    LookupResult,
    Module,
    NotFound,
    Unknown,
    absolute_name,
    find,
    is_users,
    lookup,
    top_module,
)
from trainer.core.errors import UserError

_MOST_BASES = 12
"""Maximum number of classes to follow to a base class."""
_MOST_POSITIONAL = 2
"""The first arguments of timm's `create_model` and of peft's configurations: names and types."""
_REFERENCES = re.compile(r"(^|::)reference(::|://)")
_REMOVE = "remove it, or load the model in code of your own"


@dataclass(frozen=True)
class Refusal:
    """The reason why a target must not be called, and how to do without it."""

    reason: str
    fix: str
    defined: str = ""
    """Entry of `security.allow` that would allow it; empty: nothing would."""

    def error(self, key: str, path: str, trusted: Sequence[str] = ()) -> UserError:
        """Return the error for the target `path` at the key `key`; `trusted` is `security.allow` as it is."""
        message = f"{key}={path}: refused, because {self.reason}"
        return NotAllowed(message, self.fix, [*trusted, self.defined]) if self.defined else UserError(message, self.fix)


def section_of(key: str) -> str:
    """Return the section whose own target is at `key`, such as `model._target_`; empty for a nested target."""
    section, _, rest = key.removesuffix("._target_").partition(".")
    if section in ("callbacks", "logger"):
        return section if rest and "." not in rest and "[" not in rest else ""
    return section if not rest and section in allowed.SECTION_KINDS else ""


def refusal(path: str, key: str, cwd: Path, trusted: Sequence[str] = ()) -> Refusal | None:
    """Return why the target `path` at `key` must not be called; None if it may be, as far as source text shows.

    Args:
        path: Dotted path, as written.
        key: Its key in the configuration.
        cwd: Directory that is searched first.
        trusted: `security.allow`.
    """
    path = canonical(path)
    parts = path.split(".")
    if any(part.startswith("__") for part in parts):
        return Refusal("names that begin with two underscores reach the interpreter", "name a class or a function")
    section = section_of(key)
    if path in trusted or allowed.is_named(path, section):
        return None
    top = top_module(parts[0], cwd)
    if top is None:
        return None  # reported as a package that is not installed
    return _judged(path, find(path, cwd), section, cwd, trusted)


def _judged(path: str, result: LookupResult, section: str, cwd: Path, trusted: Sequence[str]) -> Refusal | None:
    defined = _defined(path, result)
    if allowed.under(defined, trusted):
        return None
    package = defined.partition(".")[0]
    module = result.module if isinstance(result, Definition) else result if isinstance(result, Module) else None
    module = module or top_module(package, cwd)
    if package not in allowed.PACKAGES and module is not None and is_users(module, cwd):
        return None
    if isinstance(result, NotFound):
        return None  # reported as misspelt
    if isinstance(result, Definition) and isinstance(result.node, ast.ClassDef):
        kinds, complete = kinds_of(result)
        return of_class(defined, kinds, section, complete)
    return _of_package(defined, section)


def _defined(path: str, result: LookupResult) -> str:
    """Return the dotted name of what `path` leads to behind re-exports, such as `subprocess.run` for `mine.run`."""
    if isinstance(result, Definition):
        owner = f"{result.owner.name}." if result.owner is not None else ""
        return f"{result.module.name}.{owner}{result.node.name}"
    if isinstance(result, Module):
        return result.name
    return result.path if isinstance(result, Unknown) and result.path else path


def _of_package(defined: str, section: str) -> Refusal | None:
    """Judge a function, or a name that source text does not show, by its name."""
    if allowed.is_function(defined, section) or allowed.is_named(defined, section):
        return None
    parts = defined.split(".")
    if allowed.is_builder(defined) or (parts[-1][:1].isupper() and allowed.holds_classes(defined)):
        return None  # the object is judged when it is imported
    return refused(defined, section)


def of_class(defined: str, kinds: set[str], section: str, complete: bool = True) -> Refusal | None:
    """Judge a class outside of the user's code.

    Args:
        defined: Dotted name of its definition.
        kinds: Kinds of its base classes (`allowed.KINDS`).
        section: Section whose own target it is; empty for a nested target.
        complete: Whether all base classes are known.
    """
    if allowed.is_named(defined, section) or (allowed.under(defined, allowed.FREE_MODULES) and not section):
        return None
    if not allowed.holds_classes(defined):
        return refused(defined, section)
    expected = allowed.SECTION_KINDS.get(section)
    if not complete or (kinds and (expected is None or kinds & set(expected))):
        return None
    if kinds and expected is not None:
        return Refusal(f"it is {' and '.join(sorted(kinds))}, not {expected[0]}", _instead(section))
    return refused(defined, section)


def refused(defined: str, section: str) -> Refusal:
    """Return the refusal of an object that no rule allows, with the line that allows it."""
    reason = f"{defined} is not among what a config may name (docs/security.md)"
    return Refusal(reason, _instead(section), defined)


def _instead(section: str) -> str:
    kinds = allowed.SECTION_KINDS.get(section)
    return f"name {kinds[0]} or your own function" if kinds else "name a listed class or your own function"


@cache
def kinds_of(definition: Definition, most: int = _MOST_BASES) -> tuple[set[str], bool]:
    """Return the kinds of a class by its base classes, and whether all of them could be followed."""
    own = allowed.KINDS.get(f"{definition.module.name}.{definition.node.name}")
    if own is not None:
        return {own}, True
    kinds: set[str] = set()
    complete = most > 0
    assert isinstance(definition.node, ast.ClassDef)
    for base in definition.node.bases if most else []:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        if not all(part.isidentifier() for part in name.split(".")):
            complete = False
            continue
        kind = allowed.KINDS.get(absolute_name(definition.module, name))
        if kind is not None:
            kinds.add(kind)
            continue
        above = lookup(definition.module, name)
        if isinstance(above, Definition) and isinstance(above.node, ast.ClassDef) and above != definition:
            inherited, known = kinds_of(above, most - 1)
            kinds |= inherited
            complete = complete and known
        elif name.rpartition(".")[2] not in ("object", "Generic", "Protocol", "ABC", "NamedTuple", "Enum"):
            complete = False
    return kinds, complete


def discovery_refusal(path: str) -> Refusal | None:
    """Return why `hydra.utils.get_method` must not return the object at `path`, which may be called itself."""
    if path.rpartition(".")[2] in (*allowed.BUILDERS, allowed.LOADER):
        return Refusal("its arguments would not be known", "write it as a _target_ with _partial_: true")
    return None


def defined_name(path: str, result: LookupResult | None) -> str:
    """Return the dotted name of what `path` leads to, as far as source text shows it; else `path`."""
    return path if result is None else _defined(path, result)


def argument_refusal(path: str, node: Mapping[str, Any], defined: str = "") -> tuple[str, Refusal] | None:
    """Return the argument of a node that would make its target execute a file, and why; None if there is none.

    Args:
        path: The node's target, as written.
        node: The node.
        defined: The dotted name of its definition, if it is known: `mine.timm.create_model` leads to timm.
    """
    path, defined = canonical(path), canonical(defined or path)
    if path.rpartition(".")[2] == allowed.LOADER and node.get("weights_only") is not True:
        reason = "without weights_only=true it unpickles the file, which can run code"
        return "weights_only", Refusal(reason, "set weights_only: true, or finetune.init_from=FILE")
    if defined.partition(".")[0] in allowed.PACKAGES and (found := _template_inside(node, "")):
        reason = "fsspec would evaluate the templates of the file that it names"
        return found, Refusal(reason, "name the data itself, or open it in a class of your own")
    if not any(allowed.under(name, allowed.ARGUMENTS_OF) for name in (path, defined)):
        return None
    positional = node.get("_args_")
    if isinstance(positional, (list, tuple)) and len(positional) > _MOST_POSITIONAL and _takes_files(defined):
        return "_args_", Refusal("arguments that load a file or a module may be among them", "write them by name")
    return _refused_inside(node, "")


def _takes_files(name: str) -> bool:
    """Return whether later positional arguments of a function or class are among the refused ones."""
    package, last = name.partition(".")[0], name.rpartition(".")[2]
    return (package == "timm" and last == "create_model") or (package == "peft" and last.endswith("Config"))


def _template_inside(node: Any, where: str) -> str | None:
    """Return the key of a URL that makes fsspec read a table of references, which has Jinja templates."""
    if isinstance(node, str):
        return where if _REFERENCES.search(node) else None
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(node, Mapping):
        if where and "_target_" in node:  # judged itself
            return None
        items = ((f"{where}.{name}" if where else str(name), item) for name, item in node.items())
    elif isinstance(node, (list, tuple)):
        items = ((f"{where}[{i}]", item) for i, item in enumerate(node))
    return next((found for name, item in items if (found := _template_inside(item, name)) is not None), None)


def _refused_inside(node: Any, where: str) -> tuple[str, Refusal] | None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            name = str(key)
            inner = f"{where}.{name}" if where else name
            if name in allowed.REFUSED_ARGUMENTS and value not in (None, False, {}, [], ""):
                return inner, Refusal(allowed.REFUSED_ARGUMENTS[name], _REMOVE)
            if "attn_implementation" in name and "/" in str(value):
                return inner, Refusal("transformers would download code", "use sdpa, eager or flash_attention_2")
            if name in ("model_name", "architecture") and ":" in str(value):
                return inner, Refusal("timm would load a model's folder, which may hold pickles", _REMOVE)
            found = _refused_inside(value, inner)
            if found is not None:
                return found
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            found = _refused_inside(item, f"{where}[{i}]")
            if found is not None:
                return found
    return None
