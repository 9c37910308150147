"""Several mistakes reported at once."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.core.errors import TrainerError, UserError


class Problems(UserError):
    """More than one; `.problems` holds them, the most important first."""

    def __init__(self, problems: Sequence[TrainerError]) -> None:
        lines = [f"{one.message}\n    {one.fix}" if one.fix else one.message for one in problems]
        super().__init__(f"{len(problems)} problems in the configuration", "\n  ".join(lines))
        self.problems = tuple(problems)


def raise_all(problems: Sequence[TrainerError]) -> None:
    """Raise nothing, the only problem as it is, or `Problems`."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)
