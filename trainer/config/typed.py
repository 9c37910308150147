"""The closed part of the configuration against its dataclasses: unknown keys, types, defaults.

Conversion is OmegaConf's for a command line; written out here so that every problem is found in one pass, each
with a line that names the key as it was written and what was expected, and because a structured merge costs
a millisecond a key.
"""

from __future__ import annotations

import typing
from contextlib import suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any

from trainer.config.cluster import CLUSTERS
from trainer.config.schema import Config, TrainerOptions
from trainer.config.strategy import STRATEGIES
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed

OPEN = ("model", "data", "task", "optimizer", "scheduler", "callbacks", "logger")
"""Sections that hold a `_target_` and its arguments."""

NAMED = ("callbacks", "logger")
"""Of the open sections those of several targets, each under a name of its own."""

CHOSEN = {"strategy": STRATEGIES, "cluster": CLUSTERS}
"""Closed sections whose class is chosen by their `name`."""

REQUIRED = ("name", "model", "data", "optimizer", "strategy", "cluster")
"""Keys that a job cannot do without."""

_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def closed_class(section: str, node: Any) -> type | None:
    """The dataclass of a closed section; null for an open one, an unknown one, and an unknown `name`."""
    if section in CHOSEN:
        return CHOSEN[section].get(str(node.get("name"))) if isinstance(node, dict) else None
    hint = _hints(Config).get(section)
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def is_closed(section: str) -> bool:
    """Whether the section's keys are those of a dataclass."""
    hint = _hints(Config).get(section)
    return section in CHOSEN or (isinstance(hint, type) and is_dataclass(hint))


def key_names(cls: type) -> list[str]:
    """The keys that a section of this dataclass has."""
    return [field.name for field in fields(cls)]


def problems_of(section: str, node: Any) -> list[UserError]:
    """What is wrong in a closed section: an unknown `name`, unknown keys, wrong types; empty when nothing."""
    if not isinstance(node, dict):
        return [UserError(f"{section}={node}: expected a group of keys", f"write {section}.KEY=VALUE")]
    if section in CHOSEN and node.get("name") not in CHOSEN[section]:
        name, names = str(node.get("name")), CHOSEN[section]
        fix = f"{did_you_mean(name, names)}choose one of: {listed(names)}"
        return [UserError(f"{section}.name={name}: there is no {section} of this name", fix)]
    cls = closed_class(section, node)
    if cls is None:
        raise KeyError(section)
    known = key_names(cls)
    unknown = [unknown_key(f"{section}.", key, known) for key in node if key not in known]
    wrong = [_type_problem(cls, f"{section}.", key, node[key]) for key in node if key in known]
    return unknown + [problem for problem in wrong if problem]


def top_level_problems(config: dict[str, Any]) -> list[UserError]:
    """Wrongly typed keys beside the sections (`seed`, `name`, ...); `own_keys.py` judges the unknown ones."""
    problems: list[UserError] = []
    plain = [key for key in key_names(Config) if key in config and _hints(Config)[key] in _EXPECTED]
    wrong = [_type_problem(Config, "", key, config[key]) for key in plain]
    for section in OPEN:
        if not isinstance(config.get(section) or {}, dict):
            fix = f"a config file of {section} holds keys, such as _target_: my_package.MyClass"
            problems.append(UserError(f"{section}={config[section]}: expected a group of keys", fix))
    return problems + [problem for problem in wrong if problem]


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with types converted and every default of the closed sections filled in.

    For a configuration without problems; the keys come in the order of the schema, then those that it does not know.
    """
    whole: dict[str, Any] = {}
    for field in fields(Config):
        value = config.get(field.name)
        if field.name in OPEN:
            whole[field.name] = value if value is not None else {}
            continue
        cls = closed_class(field.name, value if value is not None else {})
        if cls is not None:
            whole[field.name] = {f.name: _filled(cls, f, value or {}) for f in fields(cls)}
        else:
            whole[field.name] = _filled(Config, field, config)
    return {**whole, **{key: value for key, value in config.items() if key not in whole}}


def to_config(config: dict[str, Any]) -> Config:
    """The dataclasses of a configuration that has passed `check`, such as a frozen one."""
    built: dict[str, Any] = {}
    whole = complete(config)
    for name in key_names(Config):
        value = whole[name]
        cls = None if name in OPEN else closed_class(name, value)
        built[name] = cls(**value) if cls else value
    return Config(**built)


_TRAINER_KEYS = frozenset(field.name for field in fields(TrainerOptions))
NEVER_NULL = frozenset(field.name for field in fields(TrainerOptions) if field.default is not None)
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")


def is_lightnings(options: dict[str, Any]) -> bool:
    """Whether the section `trainer` has a name or a value that is Lightning's and not the schema's."""
    return (
        not options.keys() <= _TRAINER_KEYS
        or options.get("precision", "auto") not in PRECISIONS
        or -1 in (options.get("max_steps"), options.get("max_epochs"))
        or options.get("overfit_batches") == 0
        or any(isinstance(options.get(key), dict) for key in ("max_time", "accumulate_grad_batches", "profiler"))
        or isinstance(options.get("val_check_interval"), (dict, str))
        or any(options.get(key) is not None for key in ("gradient_clip_val", "gradient_clip_algorithm"))
        or any(options[key] is None for key in NEVER_NULL & options.keys())
    )


def unknown_key(prefix: str, key: str, known: list[str]) -> UserError:
    """The refusal of a key that the schema does not have."""
    if prefix == "trainer.":
        from trainer.config.lightning_names import TAKEN

        known = [*known, *TAKEN]
    fix = f"{did_you_mean(key, known, prefix=prefix)}keys here: {listed(known, 30)}"
    return UserError(f"{prefix}{key}: there is no such key", fix)


def as_written(value: Any) -> str:
    """A value as the command line has it: `null` and `true`, not Python's names."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def expected(hint: Any) -> str:
    """A type in words: `an integer or null`."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return " or ".join([*(expected(a) for a in arguments if a is not type(None)), "null"])
    if len(arguments) > 1:
        return " or ".join(map(expected, arguments))
    if typing.get_origin(hint) is list:
        return "a list such as [a,b]"
    return _EXPECTED.get(hint, str(hint))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any) -> Any:
    """`value` as the type, by OmegaConf's rules for a command line (`1` is a number, `yes` is true).

    Raises ValueError when it cannot be.
    """
    arguments = typing.get_args(hint)
    if type(None) in arguments and value is None:
        return None
    if len(arguments) > 1:
        return _first_of([a for a in arguments if a is not type(None)], value)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError
        return [_convert(arguments[0], item) for item in value]
    if hint is Any:
        return value
    return _scalar(hint, value)


def _first_of(hints: list[Any], value: Any) -> Any:
    """As the first of several types that takes the value; 1.0 stays a fraction where both are taken."""
    for hint in hints:
        if hint is int and isinstance(value, float) and float in hints:
            continue
        with suppress(ValueError, OverflowError):
            return _convert(hint, value)
    raise ValueError


def _scalar(hint: type, value: Any) -> Any:
    if value is None or isinstance(value, (dict, list)):
        raise ValueError
    if hint is str:
        return as_written(value)
    if hint is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).lower() not in words:
            raise ValueError
        return words[str(value).lower()]
    if isinstance(value, bool):
        raise ValueError
    if hint is int and isinstance(value, float):
        # OmegaConf refuses 3.0 for an integer too; 1e6 for max_steps is worth taking.
        if not value.is_integer():
            raise ValueError
        return int(value)
    return hint(value)


def _type_problem(cls: type, prefix: str, key: str, value: Any) -> UserError | None:
    hint = _hints(cls)[key]
    try:
        _convert(hint, value)
    except (ValueError, OverflowError):
        wanted = expected(hint)
        message = f"{prefix}{key}={as_written(value)}: expected {wanted}"
        return UserError(message, f"write {prefix}{key}={_example(hint)}")
    return None


def _example(hint: Any) -> str:
    inner = next((a for a in typing.get_args(hint) if a is not type(None)), hint)
    if typing.get_origin(hint) is list:
        return "[a,b]"
    return {int: "10", float: "0.5", bool: "true", str: "NAME"}.get(inner, "VALUE")


def _filled(cls: type, field: Any, node: dict[str, Any]) -> Any:
    if field.name in node:
        return _convert(_hints(cls)[field.name], node[field.name])
    if field.default_factory is not NO_DEFAULT:
        made = field.default_factory()
        return asdict(made) if is_dataclass(made) and not isinstance(made, type) else made
    return field.default
