"""The closed sections of the configuration against their dataclasses: unknown keys, types, defaults.

Values are converted as OmegaConf converts those of a command line. The conversion is written out here for two reasons:
every problem is found in one pass, in a message that names the key as it was written and the expected type; and a
structured merge takes a millisecond per key.
"""

from __future__ import annotations

import typing
from contextlib import suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from trainer.config.cluster import CLUSTERS
from trainer.config.lightning_arguments import TAKEN
from trainer.config.problems import as_written, not_a_boolean
from trainer.config.schema import Config, Precision, TrainerOptions
from trainer.config.strategy import STRATEGIES
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed

OPEN = ("model", "data", "task", "optimizer", "scheduler", "callbacks", "logger")
"""Sections that hold a `_target_` and its arguments."""

NAMED = ("callbacks", "logger")
"""Open sections that hold several targets, each under its own name."""

CHOSEN = {"strategy": STRATEGIES, "cluster": CLUSTERS}
"""Closed sections whose class is chosen by their `name`."""

REQUIRED = ("name", "model", "data", "optimizer", "strategy", "cluster")
"""Keys that every job needs."""

Options = TypeVar("Options")

_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def closed_class(section: str, node: Any) -> type | None:
    """Return the dataclass of a closed section; None for an open or unknown section, and for an unknown `name`."""
    if section in CHOSEN:
        return CHOSEN[section].get(str(node.get("name"))) if isinstance(node, dict) else None
    hint = _hints(Config).get(section)
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def is_closed(section: str) -> bool:
    """Return whether the section's keys are those of a dataclass."""
    hint = _hints(Config).get(section)
    return section in CHOSEN or (isinstance(hint, type) and is_dataclass(hint))


def key_names(cls: type) -> list[str]:
    """Return the keys of a section with this dataclass."""
    return [field.name for field in fields(cls)]


def problems_of(section: str, node: Any) -> list[UserError]:
    """Return the problems of a closed section: an unknown `name`, unknown keys, wrong types."""
    if not isinstance(node, dict):
        return [UserError(f"{section}={node}: expected a section with keys", f"write {section}.KEY=VALUE")]
    if section in CHOSEN and node.get("name") not in CHOSEN[section]:
        name, names = str(node.get("name")), CHOSEN[section]
        fix = f"{did_you_mean(name, names)}choose one of: {listed(names)}"
        return [UserError(f"{section}.name={name}: unknown {section}", fix)]
    cls = closed_class(section, node)
    if cls is None:
        raise KeyError(section)
    known = key_names(cls)
    unknown = [unknown_key(f"{section}.", key, known) for key in node if key not in known]
    wrong = [type_problem(cls, f"{section}.", key, node[key]) for key in node if key in known]
    return unknown + [problem for problem in wrong if problem]


def top_level_problems(config: dict[str, Any]) -> list[UserError]:
    """Return the keys outside of the sections (`seed`, `name`, ...) that have a wrong type.

    `own_keys.py` handles the unknown ones.
    """
    problems: list[UserError] = []
    plain = [key for key in key_names(Config) if key in config and _hints(Config)[key] in _EXPECTED]
    wrong = [type_problem(Config, "", key, config[key]) for key in plain]
    for section in OPEN:
        if not isinstance(config.get(section) or {}, dict):
            fix = f"a config file of {section} holds keys, such as _target_: my_package.MyClass"
            problems.append(UserError(f"{section}={config[section]}: expected a section with keys", fix))
    return problems + [problem for problem in wrong if problem]


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without problems, with types converted and every default filled in.

    The keys are in the order of the schema, followed by those that the schema does not have.
    """
    completed: dict[str, Any] = {}
    for field in fields(Config):
        value = config.get(field.name)
        if field.name in OPEN:
            completed[field.name] = value if value is not None else {}
            continue
        cls = closed_class(field.name, value if value is not None else {})
        if cls is not None:
            completed[field.name] = {f.name: _filled(cls, f, value or {}) for f in fields(cls)}
        else:
            completed[field.name] = _filled(Config, field, config)
    return {**completed, **{key: value for key, value in config.items() if key not in completed}}


def options_of(cls: type[Options], node: dict[str, Any]) -> Options:
    """Return the dataclass of a section without problems, with the defaults of the keys that it does not have."""
    return cls(**{field.name: _filled(cls, field, node) for field in fields(cls)})  # type: ignore[arg-type]


def to_config(config: dict[str, Any]) -> Config:
    """Return the dataclasses of a configuration that has passed `check`, such as a frozen one."""
    values: dict[str, Any] = {}
    completed = complete(config)
    for name in key_names(Config):
        value = completed[name]
        cls = None if name in OPEN else closed_class(name, value)
        values[name] = cls(**value) if cls else value
    return Config(**values)


_TRAINER_KEYS = frozenset(field.name for field in fields(TrainerOptions))
NEVER_NULL = frozenset(field.name for field in fields(TrainerOptions) if field.default is not None)
PRECISIONS: tuple[str, ...] = typing.get_args(Precision)


def is_lightnings(options: dict[str, Any]) -> bool:
    """Return whether the section `trainer` has a name or a value of Lightning that the schema lacks."""
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
    """Return the error for a key that the schema does not have."""
    if prefix == "trainer.":
        known = [*known, *TAKEN]
    fix = f"{did_you_mean(key, known, prefix=prefix)}keys here: {listed(known, 30)}"
    return UserError(f"{prefix}{key}: unknown key", fix)


def expected(hint: Any) -> str:
    """Describe a type in words, such as `an integer or null`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(as_written, arguments))
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
    """Convert `value` to a type by OmegaConf's rules for a command line (`1` is a number, `yes` is true).

    Any string is accepted for a `Literal`: `trainer/checks/config.py` reports a wrong choice together with all other
    wrong values.

    Raises:
        ValueError: The value cannot be converted.
    """
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return _scalar(str, value)
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
    """Convert to the first type that accepts the value; 1.0 stays a fraction if both int and float are accepted."""
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
        if str(value).lower() not in _BOOLEANS:
            raise ValueError
        return _BOOLEANS[str(value).lower()]
    if isinstance(value, bool):
        raise ValueError
    if hint is int and isinstance(value, float):
        # OmegaConf refuses 3.0 for an integer. Integral floats are accepted here for values such as max_steps=1e6.
        if not value.is_integer():
            raise ValueError
        return int(value)
    return hint(value)


def type_problem(cls: type, prefix: str, key: str, value: Any) -> UserError | None:
    """Return the error for a value of a wrong type of a key of this dataclass; `prefix` is its section and a dot."""
    hint = _hints(cls)[key]
    try:
        _convert(hint, value)
    except (ValueError, OverflowError):
        if bool in (hint, *typing.get_args(hint)):
            return not_a_boolean(f"{prefix}{key}", value, expected(hint))
        message = f"{prefix}{key}={as_written(value)}: expected {expected(hint)}"
        return UserError(message, f"write {prefix}{key}={_example(hint)}")
    return None


def _example(hint: Any) -> str:
    if typing.get_origin(hint) is list:
        return "[a,b]"
    if typing.get_origin(hint) is Literal:
        return as_written(typing.get_args(hint)[0])
    inner = next((a for a in typing.get_args(hint) if a is not type(None)), None)
    if inner is not None:
        return _example(inner)
    return {int: "10", float: "0.5", str: "NAME"}.get(hint, "VALUE")


def _filled(cls: type, field: Any, node: dict[str, Any]) -> Any:
    if field.name in node:
        return _convert(_hints(cls)[field.name], node[field.name])
    if field.default_factory is not NO_DEFAULT:
        default = field.default_factory()
        return asdict(default) if is_dataclass(default) and not isinstance(default, type) else default
    return field.default
