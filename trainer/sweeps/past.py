"""The earlier trials of a sweep, as the searches that learn from them see them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.sweeps.records import Parameter, Spec


@dataclass(frozen=True)
class Past:
    """An earlier trial, as a sampler sees it."""

    number: int
    values: Mapping[str, str]
    """Parameter to value, as an override has it."""
    objective: Sequence[float] | None
    """None: it failed, or has no value yet."""
    is_over: bool = True
    curve: Sequence[tuple[int, float]] = ()
    """(validation, value) so far."""
    pruned: bool = False
    added: Sequence[Parameter] = ()
    """Parameters that this trial has beside those of the spec."""


def seed_of(spec: Spec, number: int) -> int:
    """Return the seed of the question for a trial."""
    return zlib.crc32(f"{spec.seed}/{number}".encode())


def fits(parameter: Parameter, text: str) -> bool:
    """Return whether a value is in the range of a parameter, which may have been changed since."""
    if parameter.kind == "choice":
        return text in parameter.choices
    try:
        return parameter.low <= float(text) <= parameter.high
    except ValueError:
        return False
