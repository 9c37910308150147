"""Checks of the weights of a mixture. Imports no torch, because the config check uses it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.config.problems import as_written
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean


def problems_of_weights(weights: Mapping[str, Any], sources: Iterable[str]) -> Iterator[UserError]:
    """Yield problems of the weights: each source needs one, and each must be greater than 0."""
    names = list(sources)
    each_fix = f"give one weight for each of {', '.join(names)}"
    for name in weights:
        if name not in names:
            hint = did_you_mean(name, names, prefix="data.weights.")
            yield UserError(f"data.weights.{name}: no source has this name", hint + each_fix)
    missing = [name for name in names if name not in weights]
    if missing:
        yield UserError(f"data.weights: no weight for {', '.join(missing)}", each_fix)
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            problem, fix = "expected a number", f"write data.weights.{name}=1"
        elif not 0 < weight < float("inf"):
            problem, fix = "must be more than 0", "remove that source, or increase its weight"
        else:
            continue
        yield UserError(f"data.weights.{name}={as_written(weight)}: {problem}", fix)
