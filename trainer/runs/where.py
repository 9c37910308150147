"""The conditions of `trainer ls --where`: `state=finished model=resnet18 val/acc>0.9`.

    conditions = condition { blank condition }                  all of them must hold
    condition  = key operator value
    key        = a column, a metric, a key of the configuration; in quotes if it has other characters
    operator   = "=" | "!=" | "<" | "<=" | ">" | ">="
    value      = alternative { "," alternative }                more than one only with = and !=
    alternative = text without blanks and commas, or in quotes; with = and !=, * stands for any text

Nothing of it is executed.
"""

from __future__ import annotations

import math
import operator
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from trainer.core.errors import UserError
from trainer.runs.columns import TIMES, as_number, require_keys, value_of
from trainer.runs.row import Row

_CONDITION = re.compile(
    r"""\s*(?:"(?P<key2>[^"]+)"|'(?P<key1>[^']+)'|(?P<key>[^\s"'=!<>,]+))
        \s*(?P<operator>!=|<=|>=|=|<|>)\s*
        (?P<value>(?:"[^"]*"|'[^']*'|[^\s"'=<>,]+)(?:,(?:"[^"]*"|'[^']*'|[^\s"'=<>,]+))*)(?=\s|$)""",
    re.VERBOSE,
)
_ALTERNATIVE = re.compile(r""""([^"]*)"|'([^']*)'|([^\s"',]+)""")
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")
_WORDS: dict[str, Any] = {"null": None, "none": None, "true": True, "false": False}
_HOW = "write conditions as KEY=VALUE, with one of = != < <= > >=, such as 'state=finished val/acc>0.9'"


@dataclass(frozen=True)
class Condition:
    """One condition on a run."""

    key: str
    operator: str
    alternatives: tuple[str, ...]

    def holds(self, row: Row) -> bool:
        """Return whether the run meets it. A value that is missing is equal to `null`, and neither above nor below."""
        value = value_of(row, self.key)
        if self.operator in _ORDERS:
            number, limit = as_number(value), self._limit()
            return number is not None and not math.isnan(number) and _ORDERS[self.operator](number, limit)
        is_equal = any(_is_equal(value, one) for one in self.alternatives)
        return is_equal if self.operator == "=" else not is_equal

    def _limit(self) -> float:
        """Return the number behind <, <=, > or >=; a date, or a duration such as 2d, in seconds.

        Raises:
            UserError: It is none of these.
        """
        text = self.alternatives[0]
        number, duration = as_number(text), _DURATION.fullmatch(text)
        if number is not None and len(self.alternatives) == 1:
            return number
        if duration and len(self.alternatives) == 1:
            seconds = float(duration[1]) * _SECONDS[duration[2]]
            return time.time() - seconds if self.key in TIMES else seconds
        if self.key in TIMES:
            try:
                return datetime.fromisoformat(text).timestamp()
            except (ValueError, OverflowError):
                pass
        written = f"{self.key}{self.operator}{','.join(self.alternatives)}"
        raise UserError(
            f"--where {written}: {self.operator} needs one number", "such as 0.9, 1e-3, 2d (two days), or 2026-11-30"
        )


def parse(text: str) -> list[Condition]:
    """Return the conditions in a text.

    Raises:
        UserError: It does not follow the grammar.
    """
    conditions, position = [], 0
    while text[position:].strip():
        match = _CONDITION.match(text, position)
        if match is None:
            raise UserError(f"--where: cannot read {text[position:].strip()!r}", _HOW)
        key = match["key"] or match["key1"] or match["key2"]
        found = tuple(double or single or bare for double, single, bare in _ALTERNATIVE.findall(match["value"]))
        condition = Condition(key, match["operator"], found)
        if condition.operator in _ORDERS:
            condition._limit()
        conditions.append(condition)
        position = match.end()
    return conditions


def select(rows: Sequence[Row], conditions: Sequence[Condition]) -> list[Row]:
    """Return the runs that meet all conditions.

    Raises:
        UserError: A condition names a key that no run has.
    """
    require_keys([one.key for one in conditions], rows, "--where")
    return [row for row in rows if all(one.holds(row) for one in conditions)]


def _is_equal(value: Any, text: str) -> bool:
    if isinstance(value, list):
        return any(_is_equal(item, text) for item in value)
    word = text.lower()
    if word in _WORDS and (value is None or isinstance(value, bool)):
        return value is _WORDS[word]
    if value is None:
        return False
    number, other = as_number(value), as_number(text)
    if number is not None and other is not None:
        return number == other or (math.isnan(number) and math.isnan(other))
    return fnmatchcase(str(value), text.replace("[", "[[]").replace("?", "[?]"))
