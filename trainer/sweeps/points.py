"""The points of a search that does not depend on results: grid, random and Sobol, as functions of seed and number."""

from __future__ import annotations

import itertools
import math
import random
import warnings

from trainer.sweeps.records import Method, Parameter

Values = dict[str, str]


def points(parameters: list[Parameter], method: Method, seed: int, first: int, count: int) -> list[Values]:
    """Return the points `first` to `first + count` of a search; fewer where a grid ends.

    The order of a grid is that of Hydra's basic sweeper: the last parameter varies fastest. Point n of a random or a
    Sobol search is the same however many are drawn.

    Args:
        parameters: The space.
        method: grid, random or sobol.
        seed: Of the sweep.
        first: Number of the first point.
        count: Number of points.
    """
    if method == "grid":
        product = itertools.product(*(one.choices for one in parameters))
        keys = [one.key for one in parameters]
        return [dict(zip(keys, values, strict=True)) for values in itertools.islice(product, first, first + count)]
    if method == "sobol" and parameters:
        rows = _sobol(len(parameters), seed, first, count)
    else:
        rows = [_uniform(len(parameters), seed, number) for number in range(first, first + count)]
    return [{one.key: scaled(one, share) for one, share in zip(parameters, row, strict=True)} for row in rows]


def scaled(parameter: Parameter, share: float) -> str:
    """Return the value at `share` (from 0 to 1) of a parameter's range, as an override has it.

    Choices and integers get equal shares; with `log` the logarithm is uniform.
    """
    if parameter.choices:
        return parameter.choices[min(int(share * len(parameter.choices)), len(parameter.choices) - 1)]
    low, high = parameter.low, parameter.high
    if parameter.step:
        steps = math.floor((high - low) / parameter.step + 1e-9)
        value = low + min(int(share * (steps + 1)), steps) * parameter.step
        return str(int(value)) if parameter.kind == "int" else repr(value)
    if parameter.kind == "int":  # half a step on both sides, so that the ends are as likely as the rest
        low, high = low - 0.5, high + 0.5
    value = math.exp(math.log(low) + share * math.log(high / low)) if parameter.log else low + share * (high - low)
    if parameter.kind == "int":
        return str(int(min(max(math.floor(value + 0.5), parameter.low), parameter.high)))
    return repr(min(max(value, low), high))


def _uniform(dimensions: int, seed: int, number: int) -> list[float]:
    generator = random.Random(f"{seed}/{number}")
    return [generator.random() for _ in range(dimensions)]


def _sobol(dimensions: int, seed: int, first: int, count: int) -> list[list[float]]:
    """Return points of Owen's scrambled Sobol sequence (scipy.stats.qmc)."""
    from scipy.stats import qmc

    engine = qmc.Sobol(dimensions, scramble=True, seed=seed)
    if first:
        engine.fast_forward(first)
    with warnings.catch_warnings():  # that the balance needs a power of two: any prefix is still spread evenly
        warnings.simplefilter("ignore", UserWarning)
        drawn = engine.random(count)
    return [[float(share) for share in row] for row in drawn]
