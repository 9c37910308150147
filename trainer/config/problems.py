"""Errors about configuration values: several reported at once, with values as the command line has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.core.errors import TrainerError, UserError


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
