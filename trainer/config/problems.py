"""Several mistakes reported at once."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.errors import TrainerError, UserError


def raise_all(problems: Sequence[TrainerError]) -> None:
    """Raise nothing, the only problem, or one UserError with a line for each, in the order given."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [f"{problem.message}\n    {problem.fix}" if problem.fix else problem.message for problem in problems]
    raise UserError(f"{len(problems)} problems in the configuration", "\n  ".join(lines))
