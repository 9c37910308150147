"""The search space of a sweep, from overrides that Hydra's own parser has read."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trainer.core.errors import UserError
from trainer.sweeps.directory import MOST_TRIALS
from trainer.sweeps.records import Kind, Parameter

CONTROL = "sweep"
"""Overrides of this section describe the sweep, not its trials."""
_HYDRAS = ("hydra/sweeper", "hydra.sweeper.", "hydra.mode", "hydra/launcher", "hydra.launcher.")
"""Overrides that describe a sweep of Hydra."""


@dataclass(frozen=True)
class Space:
    """The overrides that every trial has, the parameters that vary, and the overrides that describe the sweep."""

    fixed: list[str]
    parameters: list[Parameter]
    control: dict[str, Any]
    """Key of `sweep.*`, without the section, to its value."""


def space_of(overrides: list[Any], seed: int) -> Space:
    """Return the space of parsed overrides, of which a later one replaces an earlier one of the same key.

    Args:
        overrides: Overrides as `config.compose.swept` returns them.
        seed: Shuffles what `shuffle(...)` asks for.

    Raises:
        UserError: A sweep has no values, or its values cannot be used.
    """
    chosen: dict[str, Any] = {}
    for one in overrides:
        chosen.pop(one.get_key_element().lstrip("+"), None)
        chosen[one.get_key_element().lstrip("+")] = one
    space = Space([], [], {})
    for key, one in chosen.items():
        section, _, name = key.partition(".")
        if section == CONTROL and name:
            if one.is_sweep_override():
                raise UserError(f"{one.input_line}: it describes the whole sweep", f"write one value: {key}=VALUE")
            space.control[name] = one.value()
        elif one.is_sweep_override():
            space.parameters.append(_parameter(one, seed))
        elif not key.startswith(_HYDRAS):
            space.fixed.append(str(one.input_line))
    return space


def _parameter(override: Any, seed: int) -> Parameter:
    key, value = override.get_key_element(), override.value()
    tags = {tag for tag in getattr(value, "tags", ()) if tag}  # a glob has none
    unknown = tags - {"log", "int", "float"}
    if unknown:
        raise UserError(
            f"{override.input_line}: unknown tag {sorted(unknown)[0]}", "use tag(log, ...), or cast with int(...)"
        )
    if override.is_interval_sweep():
        return _interval(key, value, "log" in tags, override.input_line)
    numbers = override.is_range_sweep() and not value.shuffle
    with _seeded(f"{seed}/{key}"):
        choices = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    if not choices:
        raise UserError(f"{override.input_line}: no values", f"write {key}=A,B")
    if numbers and len(choices) > 1:
        kind: Kind = "float" if any(isinstance(one, float) for one in (value.start, value.stop, value.step)) else "int"
        low, high = sorted((float(choices[0]), float(choices[-1])))
        return Parameter(
            key=key, kind=kind, choices=choices, low=low, high=high, log="log" in tags, step=abs(float(value.step))
        )
    return Parameter(key=key, kind="choice", choices=choices)


def _interval(key: str, value: Any, log: bool, line: str) -> Parameter:
    low, high = value.start, value.end
    is_int = isinstance(low, int) and isinstance(high, int) and not isinstance(low, bool)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{line}: not an interval", f"write {key}=interval(LOW, HIGH) with LOW below HIGH")
    if log and low <= 0:
        raise UserError(f"{line}: a logarithmic interval begins above 0", f"write {key}=tag(log, interval(1e-5, 1))")
    return Parameter(key=key, kind="int" if is_int else "float", low=float(low), high=float(high), log=log)


def size(parameters: list[Parameter]) -> int | None:
    """Return the number of points of the grid; None if a parameter has infinitely many values.

    Raises:
        UserError: There are more than MOST_TRIALS.
    """
    if any(not one.choices for one in parameters):
        return None
    number = math.prod(len(one.choices) for one in parameters)
    if number > MOST_TRIALS:
        fix = "give fewer values, or draw some of them: sweep.method=sobol sweep.trials=100"
        raise UserError(f"the grid has {number} points, more than {MOST_TRIALS}", fix)
    return number


def overrides_of(fixed: list[str], values: dict[str, str]) -> list[str]:
    """Return the command line of a point."""
    return [*fixed, *(f"{key}={value}" for key, value in values.items())]


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Seed the global generator that Hydra's `shuffle` draws from, and restore it."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
