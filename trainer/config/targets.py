"""Check the `_target_` nodes of a configuration without importing a target."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.allow import argument_refusal, defined_name, discovery_refusal, refusal
from trainer.config.allowed import DISCOVERY
from trainer.config.instantiate import DIRECTIVES
from trainer.config.namespaces import canonical
from trainer.config.nodes import CONVERSIONS
from trainer.config.problems import as_written, not_a_boolean
from trainer.config.schedule import FILLED
from trainer.config.signature import TRAINERS_OWN, Argument, Signature, signature_of
from trainer.config.sources import Module, NotFound, find
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed, nearest


@dataclass(frozen=True)
class Given:
    """The arguments that a section's target gets in addition to the keys of the config."""

    positional: int = 0
    """Number of positional arguments."""
    named: tuple[str, ...] = ()
    """Keyword arguments."""
    filled: tuple[str, ...] = ()
    """Keyword arguments that are filled in if the target takes them and the config has none, or null."""
    by_name: str = ""
    """Name of the positional argument that is passed by keyword if the target has an argument of this name."""


SECTIONS = {
    "model": Given(),
    "data": Given(named=TRAINERS_OWN["data"]),
    "task": Given(named=("model",)),
    "optimizer": Given(positional=1, named=TRAINERS_OWN["optimizer"]),
    "scheduler": Given(
        positional=1, named=(*TRAINERS_OWN["scheduler"], "total_steps"), filled=FILLED, by_name="optimizer"
    ),
}
"""The open sections with a single target, and the arguments that it gets from the trainer."""


@dataclass(frozen=True)
class _Place:
    """Where targets are looked for, and which of them may be named in addition."""

    cwd: Path
    trusted: tuple[str, ...]
    """`security.allow`."""


def problems_of_targets(config: dict[str, Any], cwd: Path) -> list[UserError]:
    """Return targets that are refused or do not exist, and arguments that are unknown, missing or of a wrong type."""
    problems: list[UserError] = []
    place = _place(config, cwd)
    for section, given in SECTIONS.items():
        node = config[section]
        if not node.get("_target_"):
            if section in ("model", "optimizer") or (section == "data" and "_target_" not in node):
                fix = f"choose one with {section}=NAME, or set {section}._target_=my_package.MyClass"
                if isinstance(node.get("class_path"), str):  # LightningCLI's
                    fix = _LIGHTNING_CLI["class_path"].format(node["class_path"])
                problems.append(UserError(f"{section}._target_ is missing", fix))
            continue
        problems += _node(section, node, given, place)
    for section, given, kind in (("callbacks", Given(), "Callback"), ("logger", Given(filled=("save_dir",)), "Logger")):
        for name, node in (config.get(section) or {}).items():
            where = f"{section}.{name}"
            if node is None:
                continue
            if not isinstance(node, dict) or not node.get("_target_"):
                fix = f"set {where}._target_=my_package.My{kind}, or {where}=null to disable it"
                problems.append(UserError(f"{where}: a {kind.lower()} needs a _target_", fix))
                continue
            problems += _node(where, node, given, place)
    return problems


def problems_of_section(section: str, node: dict[str, Any], config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield the problems of a section with a target that the trainer fills in later."""
    yield from _node(section, node, SECTIONS[section], _place(config, cwd))


def _place(config: dict[str, Any], cwd: Path) -> _Place:
    return _Place(cwd, tuple(map(canonical, (config.get("security") or {}).get("allow") or ())))


def _node(where: str, node: dict[str, Any], given: Given, place: _Place, called: bool = True) -> Iterator[UserError]:
    """Yield the problems of a node and of the nodes in it.

    `called` is false for nodes that `_recursive_: false` leaves to a target, which may call them with more arguments.
    """
    yield from _directives(where, node)
    yield from _target(where, node, given, place, called)
    called = called and node.get("_recursive_") is not False
    for name, value in node.items():
        yield from _nested(f"{where}.{name}", value, place, called)


def _nested(where: str, value: Any, place: _Place, called: bool) -> Iterator[UserError]:
    if isinstance(value, dict):
        if value.get("_target_"):
            given = SECTIONS["scheduler"] if re.fullmatch(r"scheduler(\.schedulers\[\d+\])+", where) else Given()
            yield from _node(where, value, given, place, called)
            return
        called = called and value.get("_recursive_") is not False
        for name, item in value.items():
            yield from _nested(f"{where}.{name}", item, place, called)
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _nested(f"{where}[{i}]", item, place, called)


def _directives(where: str, node: dict[str, Any]) -> Iterator[UserError]:
    for key in ("_recursive_", "_partial_"):
        if not isinstance(node.get(key, False), bool):
            yield not_a_boolean(f"{where}.{key}", node[key])
    convert = node.get("_convert_")
    if convert is not None and str(convert).lower() not in CONVERSIONS:
        fix = f"{did_you_mean(str(convert), CONVERSIONS)}choose one of: {listed(CONVERSIONS)}"
        yield UserError(f"{where}._convert_={as_written(convert)}: invalid choice", fix)


def _target(where: str, node: dict[str, Any], given: Given, place: _Place, called: bool) -> Iterator[UserError]:
    path, key = node["_target_"], f"{where}._target_"
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        yield UserError(f"{key}={path}: not the import path of a class or function", "write my_package.MyClass")
        return
    refused = refusal(path, key, place.cwd, place.trusted)
    result = None if refused else find(path, place.cwd)
    argument = argument_refusal(path, node, defined_name(path, result))
    if refused:
        yield refused.error(key, path, place.trusted)
    elif argument:
        yield argument[1].error(f"{where}.{argument[0]}", as_written(node.get(argument[0], "...")))
    elif path in DISCOVERY:
        yield from _discovered(f"{where}.path", node.get("path"), place)
    elif isinstance(result, NotFound):
        yield _not_found(key, path, result)
    elif isinstance(result, Module):
        yield UserError(f"{key}={path}: this is a module", f"name a class or function in it: {_classes(result)}")
    elif result is not None and called:
        signature = signature_of(result)
        if signature is not None:
            yield from _arguments(where, node, given, signature)


def _discovered(key: str, path: Any, place: _Place) -> Iterator[UserError]:
    """Yield the problems of the path that is given to `hydra.utils.get_class` and the like."""
    if not isinstance(path, str):
        return
    refused = refusal(path, key, place.cwd, place.trusted) or discovery_refusal(path)
    result = find(path, place.cwd)
    if refused:
        yield refused.error(key, path, place.trusted)
    elif isinstance(result, NotFound):
        yield _not_found(key, path, result)


def _not_found(key: str, path: str, missing: NotFound) -> UserError:
    if not missing.parent:
        hint = did_you_mean(missing.name, missing.known)
        fix = f"{hint}install the package, or run trainer in the directory that holds {missing.name}"
        return UserError(f"{key}={path}: no module named {missing.name}", fix)
    near = nearest(missing.name, missing.known)
    fix = f"did you mean {missing.parent}.{near}?" if near else f"it has: {listed(missing.known)}"
    return UserError(f"{key}={path}: {missing.parent} has no {missing.name}", fix)


_LIGHTNING_CLI = {
    "class_path": "write _target_: {} for class_path, and the init_args next to it",
    "init_args": "write the arguments under init_args one level up, next to _target_",
}
"""Fix by key of LightningCLI."""


def _classes(module: Module) -> str:
    from trainer.config.sources import parsed

    tree = parsed(module.file) if module.file else None
    return listed(n.name for n in (tree.body if tree else []) if isinstance(n, (ast.ClassDef, ast.FunctionDef)))


def _arguments(where: str, node: dict[str, Any], given: Given, signature: Signature) -> Iterator[UserError]:
    written = {name: value for name, value in node.items() if name not in DIRECTIVES}
    if given.by_name in signature.names():
        given = replace(given, positional=0, named=(*given.named, given.by_name))
    skipped = given.positional + len(node.get("_args_") or [])
    named = signature.arguments[skipped:]
    known = {argument.name: argument for argument in named}
    target = node["_target_"]
    for name, value in written.items():
        if name in known:
            yield from _type(where, known[name], value)
        elif not signature.takes_more and name not in given.named:
            hint = did_you_mean(name, [k for k in known if k not in written], prefix=f"{where}.")
            fix = f"{hint}it takes: {listed(known, 30)}"
            if name in _LIGHTNING_CLI:
                fix = _LIGHTNING_CLI[name].format(value)
            yield UserError(f"{where}.{name}: {target} takes no argument {name}", fix)
    if node.get("_partial_"):
        return
    # The trainer passes its own keys of `data` on if they have a value.
    passed_on = {name for name in given.named if where != "data" or written.get(name) is not None}
    for argument in named:
        if argument.required and argument.name not in {*written, *passed_on, *given.filled}:
            fix = f"set {where}.{argument.name}=VALUE"
            yield UserError(f"{where}.{argument.name} is missing: {target} needs it", fix)


def _type(where: str, argument: Argument, value: Any) -> Iterator[UserError]:
    # Null arguments of the model are filled from the data. checks/config.py checks the trainer's keys.
    if (value is None and where == "model") or argument.name in TRAINERS_OWN.get(where, ()):
        return
    if where == "optimizer" and argument.name == "fused" and value == "auto":  # train/optimization.py chooses
        return
    if value is None and (where.startswith("logger.") or (where.startswith("scheduler") and argument.name in FILLED)):
        return
    if value is None and where.startswith("callbacks.") and argument.name == "monitor":  # filled by early_stopping.py
        return
    if argument.type is None or isinstance(value, dict) or argument.type.accepts(value):
        return
    words = argument.type.words()
    yield UserError(
        f"{where}.{argument.name}={as_written(value)}: expected {words}", f"correct {where}.{argument.name}"
    )
