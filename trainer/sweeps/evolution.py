"""CMA-ES as a pure function: the distribution is computed from all results for every suggestion.

Optuna's sampler keeps the state of the optimizer, a pickle, in the trials of its storage. Here the optimizer of the
same package (cmaes) is told all results again, a population at a time in the order of the trials.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from trainer.core.errors import EnvironmentFault
from trainer.core.install import pip_install
from trainer.sweeps.past import Past, fits, seed_of
from trainer.sweeps.points import scaled
from trainer.sweeps.records import Direction, Parameter, Spec

_SIGMA = 1 / 6
"""Initial standard deviation as a share of a parameter's range: that of Optuna's sampler."""


def evolve(spec: Spec, past: Sequence[Past], direction: Direction, number: int) -> dict[str, str]:
    """Return the point of trial `number`. Choices, and a single numeric parameter, are drawn at random.

    Raises:
        EnvironmentFault: The package cmaes is not installed.
    """
    seed = seed_of(spec, number)
    generator = random.Random(seed)
    numeric = [one for one in spec.parameters if one.kind != "choice"]
    shares = {one.key: generator.random() for one in spec.parameters}
    if len(numeric) > 1:
        shares |= _asked(numeric, past, direction, seed)
    return {one.key: scaled(one, shares[one.key]) for one in spec.parameters}


def _asked(numeric: list[Parameter], past: Sequence[Past], direction: Direction, seed: int) -> dict[str, float]:
    try:
        import cmaes
        import numpy as np
    except ImportError:
        raise EnvironmentFault("cmaes needs a package", pip_install("sweep")) from None
    sign = -1 if direction == "maximize" else 1
    told = [
        (np.array([share_of(parameter, one.values[parameter.key]) for parameter in numeric]), sign * one.objective[0])
        for one in sorted(past, key=lambda one: one.number)
        if one.objective is not None
        and not one.pruned
        and all(fits(key, one.values.get(key.key, "")) for key in numeric)
    ]
    bounds = np.array([[0.0, 1.0]] * len(numeric))
    optimizer = cmaes.CMA(mean=np.full(len(numeric), 0.5), sigma=_SIGMA, bounds=bounds, seed=seed)
    size = optimizer.population_size
    for begin in range(0, len(told) - size + 1, size):
        optimizer.tell(told[begin : begin + size])
    optimizer.reseed_rng(seed)
    point = optimizer.ask()
    return {parameter.key: float(share) for parameter, share in zip(numeric, point, strict=True)}


def share_of(parameter: Parameter, text: str) -> float:
    """Return where in a parameter's range a value is, from 0 to 1: the inverse of `points.scaled`."""
    if text in parameter.choices:
        return (parameter.choices.index(text) + 0.5) / len(parameter.choices)
    low, high, value = parameter.low, parameter.high, float(text)
    if parameter.kind == "int":
        low, high = low - 0.5, high + 0.5
    if parameter.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)
