"""Errors about configuration values: several reported at once, with values as the command line has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.core.errors import TrainerError, UserError
from trainer.core.near import did_you_mean


class NotAllowed(UserError):
    """A target that `security.allow` would allow: `names` is the whole list to set, because a list replaces a list."""

    def __init__(self, message: str, instead: str, names: Sequence[str]) -> None:
        self.instead, self.names = instead, tuple(dict.fromkeys(names))
        super().__init__(message, f"{instead}; if you trust this config: security.allow=[{','.join(self.names)}]")


class Problems(UserError):
    """More than one problem; `problems` holds them, the most important first."""

    def __init__(self, problems: Sequence[TrainerError]) -> None:
        problems = _with_one_permission(problems)
        lines = [f"{one.message}\n    {one.fix}" if one.fix else one.message for one in problems]
        super().__init__(f"{len(problems)} problems in the configuration", "\n  ".join(lines))
        self.problems = tuple(problems)


def _with_one_permission(problems: Sequence[TrainerError]) -> Sequence[TrainerError]:
    """Let every refusal advise the one list that allows all of them."""
    names = [name for one in problems if isinstance(one, NotAllowed) for name in one.names]
    return [NotAllowed(one.message, one.instead, names) if isinstance(one, NotAllowed) else one for one in problems]


def raise_all(problems: Sequence[TrainerError]) -> None:
    """Raise the only problem as it is, several as `Problems`, and nothing if there are none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


def as_written(value: Any) -> str:
    """Return a value as a command line has it: `null` and `true`, not Python's `None` and `True`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def not_a_boolean(key: str, value: Any, expected: str = "true or false") -> UserError:
    """Return the error for a value that is not a Boolean, with the one that is near, and both."""
    near = did_you_mean(as_written(value), ("true", "false"), prefix=f"{key}=")
    return UserError(f"{key}={as_written(value)}: expected {expected}", f"{near}write {key}=true or {key}=false")
