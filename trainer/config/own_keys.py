"""User-defined top-level keys (`paths`, `tags`, `task_name`), usable in interpolations and stored with the run.

Config files define them, or they are added on the command line with `+`. A name that looks like a misspelt key of the
schema is refused: otherwise `trainr.max_steps` would be silently ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config.schema import Config
from trainer.config.typed import OPEN, is_closed, key_names
from trainer.core.errors import UserError
from trainer.core.near import listed

_LONG = 8
"""Minimum length at which two typos are tolerated."""


def own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a composed configuration that are not in the schema, in their order."""
    known = set(key_names(Config))
    return {key: value for key, value in config.items() if key not in known}


def misspelt_keys(config: Mapping[str, Any]) -> list[UserError]:
    """Return an error for each top-level key that is similar to one of the schema in spelling and content."""
    known = key_names(Config)
    problems = []
    for key, value in own_keys(config).items():
        meant = similar_key(str(key), known)
        if meant is not None and _has_plausible_value(str(key), value, meant, config):
            fix = f"did you mean {meant}? choose a less similar name for your own key; keys: {listed(known, 30)}"
            problems.append(UserError(f"{key}: unknown key", fix))
    return problems


def similar_key(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` most likely misspells, or None.

    It is one edit away (two in long names), or differs only in `_`, `-` and case.
    """
    for candidate in known:
        plain, target = _plain(name), _plain(candidate)
        if plain == target or _distance(plain, target) <= (2 if len(target) >= _LONG else 1):
            return candidate
    return None


def _has_plausible_value(key: str, value: Any, meant: str, config: Mapping[str, Any]) -> bool:
    """Return whether the value is plausible for the intended key: a section is a mapping, `seed` is not."""
    is_section = meant in OPEN or is_closed(meant)
    if not is_section:
        return not isinstance(value, (dict, list))
    if not isinstance(value, dict):
        return False
    if key == f"{meant}s":  # probably user-defined, `models: {a: ..., b: ...}`, unless its keys are those of `model`
        section = config.get(meant)
        keys = set(section) if isinstance(section, dict) else set()
        return bool(({"_target_", "name"} | keys) & set(value))
    return True


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _distance(a: str, b: str) -> int:
    """Return the edit distance with swaps of neighbours (Damerau 1964; optimal string alignment).

    It is 3 without a computation if the lengths differ by more than two.
    """
    if abs(len(a) - len(b)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        before, last, row = row, before, [i]
        for j, other in enumerate(b, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
