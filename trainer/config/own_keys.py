"""Top-level keys of the user's own (`paths`, `tags`, `task_name`): for interpolation, and kept with the run.

They are taken from config files, and from a command line with `+`, unless they look like a slip of a key of ours: then
`trainr.max_steps` would be ignored in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config.schema import Config
from trainer.config.typed import OPEN, is_closed, key_names
from trainer.core.errors import UserError
from trainer.core.near import listed

_LONG = 8
"""Letters of a name in which two slips are likely enough."""


def own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a composed configuration that are not ours, in their order."""
    known = set(key_names(Config))
    return {key: value for key, value in config.items() if key not in known}


def slips_in_files(config: Mapping[str, Any]) -> list[UserError]:
    """Top-level keys that were meant to be one of ours: alike in spelling and in what they hold."""
    known = key_names(Config)
    problems = []
    for key, value in own_keys(config).items():
        meant = slip_of(str(key), known)
        if meant is not None and _holds_alike(str(key), value, meant, config):
            fix = (
                f"did you mean {meant}? for a key of your own take a name less like it; keys here: {listed(known, 30)}"
            )
            problems.append(UserError(f"{key}: there is no such key", fix))
    return problems


def slip_of(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a slip of: one letter away (two in long names), or alike but for `_`, `-`, case."""
    for candidate in known:
        plain, wanted = _plain(name), _plain(candidate)
        if plain == wanted or _distance(plain, wanted) <= (2 if len(wanted) >= _LONG else 1):
            return candidate
    return None


def _holds_alike(key: str, value: Any, meant: str, config: Mapping[str, Any]) -> bool:
    """Whether the value could be that of the key that was meant: a section is a mapping, `seed` is not."""
    is_section = meant in OPEN or is_closed(meant)
    if not is_section:
        return not isinstance(value, (dict, list))
    if not isinstance(value, dict):
        return False
    if key == f"{meant}s":  # `models: {a: ..., b: ...}` of one's own, unless it is written like the section
        inside = config.get(meant)
        return bool({"_target_", "name"} & set(value) or set(value) & set(inside if isinstance(inside, dict) else ()))
    return True


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _distance(a: str, b: str) -> int:
    """Letters to insert, delete, replace or swap with their neighbour (Damerau 1964, each place once)."""
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
