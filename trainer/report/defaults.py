"""What of a configuration differs from the defaults, read from plain YAML: nothing is composed or resolved.

The defaults are those of the schema, of `conf/config.yaml` and of the chosen option of each group, from the run's own
code snapshot or as shipped. An option that is missing from both, or is an interpolation, has no default here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trainer.config import typed, yaml_limits
from trainer.config.schema import Config
from trainer.core.paths import conf_dir
from trainer.core.secrets import MASK
from trainer.runs.facts import flat

UNKNOWN = object()
"""The default of a key that has none, or whose default is not known."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_OVERLAYS = ("experiment", "debug")
"""Groups whose options are changes of other groups."""
_LONGEST_COMMAND = 100_000
"""Characters of a command line that is split: shlex takes time with the square of the length of a word."""
_LEFT_OUT = ("runs_dir", "name")
_SECRET = re.compile(
    r"((api|access|auth|private|secret|account)_?keys?|secrets?|passw(or)?d|passphrase|credentials?"
    r"|(^|_)(auth|access|api|bearer|hf|session|refresh)_?token|^token|webhook(_url)?)$",
    re.IGNORECASE,
)
"""Ends of the names of keys whose values are not shown. `core/secrets.py` judges names of variables, which is too much
for the keys of a configuration, such as `image_key`."""


@dataclass(frozen=True)
class Difference:
    """A value that is not the default."""

    key: str
    default: Any
    """`UNKNOWN` if there is none."""
    value: Any


def differences(
    config: Mapping[str, Any], choices: Mapping[str, Any], overrides: str, code_dir: Path
) -> list[Difference]:
    """Return the values that differ from the defaults, in the order of the configuration.

    Args:
        config: The frozen configuration.
        choices: The chosen option of each group.
        overrides: The command line.
        code_dir: The run's code snapshot.
    """
    folders = [code_dir / "conf", conf_dir()]
    defaults = flat(_defaults(config, choices, folders))
    named = [*_typed(overrides), *_in_overlays(choices, folders)]
    leaves = flat(dict(config))
    found = []
    for key, value in leaves.items():
        default = defaults.get(key, UNKNOWN)
        if isinstance(default, str) and "${" in default:
            default = _referred(default, leaves)
        if key in _LEFT_OUT or (default is not UNKNOWN and (default == value or repr(default) == repr(value))):
            continue
        # What nobody has named and no file sets was filled in by the launch.
        if default is UNKNOWN and not any(key == one or key.startswith(f"{one}.") for one in named):
            continue
        found.append(Difference(key, default, shown(key, value)))
    return found


def shown(key: str, value: Any) -> Any:
    """Return a value, or asterisks in the place of a text that its key calls a secret."""
    return MASK if isinstance(value, str) and _SECRET.search(key.rpartition(".")[2]) else value


def command(overrides: str) -> str:
    """Return the command line with asterisks in the place of secrets."""
    parts = [word.partition("=") for word in _words(overrides)]
    return shlex.join(f"{key}{sign}{shown(key, value)}" if sign else key for key, sign, value in parts)


def chosen(choices: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each group with its choice and its default choice."""
    primary = _read(conf_dir() / "config.yaml")
    listed = primary.get("defaults") if isinstance(primary.get("defaults"), list) else []
    defaults = {group: option for one in listed or [] if isinstance(one, dict) for group, option in one.items()}
    return [
        (str(group), str(option), str(defaults.get(group) or "none"))
        for group, option in choices.items()
        if option is not None and isinstance(option, (str, int))
    ]


def _defaults(config: Mapping[str, Any], choices: Mapping[str, Any], folders: list[Path]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for folder in reversed(folders):
        values.update({key: value for key, value in _read(folder / "config.yaml").items() if key != "defaults"})
    for group, option in choices.items():
        if group in _OVERLAYS or option is None:
            continue
        content = _option(str(group), str(option), folders)
        section = values.get(str(group))
        values[str(group)] = {**(section if isinstance(section, dict) else {}), **content}
    completed = {**_top_level(), **values}
    for key in {**values, **config}:
        value = values.get(key, {})
        cls = typed.closed_class(key, value)
        if cls is not None and isinstance(value, dict):
            completed[key] = {**vars(cls()), **value}
    return completed


def _typed(overrides: str) -> list[str]:
    """Return the keys of the command line."""
    return [word.lstrip("+~").partition("=")[0] for word in _words(overrides) if "=" in word]


def _words(overrides: str) -> list[str]:
    """Return the arguments of the command line; none of a damaged or endless one."""
    if len(overrides) > _LONGEST_COMMAND:
        return []
    try:
        return shlex.split(overrides)
    except ValueError:
        return []


def _in_overlays(choices: Mapping[str, Any], folders: list[Path]) -> list[str]:
    """Return the keys that the chosen experiment sets."""
    chosen = [(group, choices[group]) for group in _OVERLAYS if choices.get(group) is not None]
    return [key for group, option in chosen for key in flat(_option(group, str(option), folders)) if key]


def _top_level() -> dict[str, Any]:
    """Return the defaults of the keys outside of the sections."""
    return {one.name: one.default for one in fields(Config) if type(one.default) in (bool, int)}


def _option(group: str, option: str, folders: list[Path]) -> dict[str, Any]:
    """Return the content of an option; of the first folder that has it."""
    if not _NAME.fullmatch(group) or not _NAME.fullmatch(option) or ".." in group + option:
        return {}
    for folder in folders:
        content = _read(folder / group / f"{option}.yaml")
        if content:
            return {key: value for key, value in content.items() if key != "defaults"}
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml_limits.load(path)
    except Exception:  # of any origin: a default that cannot be read is not known
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _referred(default: str, leaves: Mapping[str, Any]) -> Any:
    """Return the value of `${section.key}` in this configuration."""
    match = re.fullmatch(r"\$\{([A-Za-z0-9_.]+)\}", default)
    return leaves.get(match[1], UNKNOWN) if match else UNKNOWN
