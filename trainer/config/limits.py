"""Limits on configuration values, written next to the field that they apply to.

In the dataclasses of the configuration, `Annotated[int, AtLeast(1)]` says which integers are valid and
`Literal["min", "max"]` which strings. `limits_of` reads them back; `trainer/checks/config.py` applies them.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal

from trainer.config.problems import as_written
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed


@dataclass(frozen=True)
class Limit:
    """A condition on the value of one key."""

    def problem(self, key: str, value: Any) -> UserError | None:
        """Return the error for a value that does not meet the condition, with a value that does."""
        raise NotImplementedError


@dataclass(frozen=True)
class AtLeast(Limit):
    """A number of at least `low`."""

    low: float

    def problem(self, key: str, value: Any) -> UserError | None:
        """Return the error for a smaller number."""
        if value >= self.low:  # false for NaN, too
            return None
        return UserError(f"{key}={as_written(value)}: must be at least {self.low:g}", f"use {key}={self.low:g} or more")


@dataclass(frozen=True)
class Share(Limit):
    """A number from 0 to 1."""

    def problem(self, key: str, value: Any) -> UserError | None:
        """Return the error for another number."""
        if 0 <= value <= 1:
            return None
        return UserError(f"{key}={as_written(value)}: must be from 0 to 1", f"for 20% write {key}=0.2")


@dataclass(frozen=True)
class MoreThan(Limit):
    """A number greater than `low`."""

    low: float

    def problem(self, key: str, value: Any) -> UserError | None:
        """Return the error for a number that is not greater."""
        if value > self.low:  # false for NaN, too
            return None
        return UserError(
            f"{key}={as_written(value)}: must be more than {self.low:g}", f"use a number above {self.low:g}"
        )


@dataclass(frozen=True)
class Amount(Limit):
    """A finite number of at least 0, such as a price."""

    def problem(self, key: str, value: Any) -> UserError | None:
        """Return the error for a negative number, an infinite one or NaN."""
        if 0 <= value < math.inf:
            return None
        return UserError(f"{key}={as_written(value)}: must be a number of at least 0", f"use {key}=0 or more")


@dataclass(frozen=True)
class BatchCount(Limit):
    """A number of batches, or a fraction from 0 to 1 of them, as Lightning takes it."""

    allow_zero: bool

    def problem(self, key: str, value: Any) -> UserError | None:
        """Return the error for a number that is neither a count nor a fraction."""
        is_count = isinstance(value, int) or (value > 1 and value % 1 == 0)
        if (is_count or 0 <= value <= 1) and (value > 0 or (value == 0 and self.allow_zero)):
            return None
        lowest = "0" if self.allow_zero else "1"
        message = f"{key}={as_written(value)}: expected a number of batches, or a fraction up to 1.0"
        return UserError(message, f"use {key}={lowest} or more, or {key}=0.25")


@dataclass(frozen=True)
class OneOf(Limit):
    """One of a fixed set of values, which a field declares as a `Literal`."""

    choices: tuple[Any, ...]

    def problem(self, key: str, value: Any) -> UserError | None:
        """Return the error for another value, with the nearest choice and all of them."""
        if value in self.choices:
            return None
        hint = did_you_mean(as_written(value), map(as_written, self.choices), prefix=f"{key}=")
        return UserError(
            f"{key}={as_written(value)}: invalid choice",
            f"{hint}choose one of: {listed(map(as_written, self.choices))}",
        )


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, MoreThan(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
BatchLimit = Annotated[int | float, BatchCount(allow_zero=True)]
"""A number of batches, or a fraction of them; 0: none."""
PositiveBatchLimit = Annotated[int | float, BatchCount(allow_zero=False)]
"""A number of batches, or a fraction of them, but not 0."""


@cache
def limits_of(cls: type) -> dict[str, Limit]:
    """Return the limits of a configuration dataclass by field, inherited fields first."""
    hints = typing.get_type_hints(cls, include_extras=True)
    limits = {field.name: _limit(hints[field.name]) for field in fields(cls)}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _limit(hint: Any) -> Limit | None:
    parts = list(_alternatives(hint))
    choices = [choice for part in parts if typing.get_origin(part) is Literal for choice in typing.get_args(part)]
    if choices:
        return OneOf((*((True, False) if bool in parts else ()), *choices))
    written = (extra for part in parts if typing.get_origin(part) is Annotated for extra in part.__metadata__)
    return next((extra for extra in written if isinstance(extra, Limit)), None)


def _alternatives(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, or the type itself."""
    if typing.get_origin(hint) in (Annotated, Literal) or not typing.get_args(hint):
        yield hint
        return
    for part in typing.get_args(hint):
        yield from _alternatives(part)
