"""Randomness that is a function of (seed, epoch, sample), so that it survives a resume and a new world size.

Two forms: a hash for whole batches of indices at once (what our own array datasets augment with), and the
seeding of Python's, NumPy's and torch's generators around `dataset[i]` for everybody else's datasets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix(*numbers: int) -> int:
    """64 well-mixed bits of any integers: splitmix64's finaliser, chained (Steele et al., OOPSLA 2014)."""
    state = 0
    for number in numbers:
        state = (state + _GOLDEN + number) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def uniform(seed: int, epoch: int, indices: torch.Tensor, draws: int) -> torch.Tensor:
    """`draws` numbers in [0, 1) for each of the (n,) sample ids: (n, draws) float64.

    A sample's numbers do not depend on its neighbours in the batch, and no generator is advanced.
    """
    keys = indices.numpy().astype(numpy.uint64)[:, None] * numpy.uint64(_GOLDEN)
    state = keys + numpy.array([mix(seed, epoch, draw) for draw in range(draws)], dtype=numpy.uint64)
    state = (state ^ (state >> numpy.uint64(30))) * numpy.uint64(_FIRST)
    state = (state ^ (state >> numpy.uint64(27))) * numpy.uint64(_SECOND)
    state ^= state >> numpy.uint64(31)
    return torch.from_numpy((state >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed what `dataset[index]` may draw from.

    torch's CPU generator alone, because torch.manual_seed would also reset the generators of the devices.
    """
    bits = mix(seed, epoch, index)
    random.seed(bits)
    numpy.random.seed(bits & 0xFFFFFFFF)
    torch.default_generator.manual_seed(bits >> 1)


class Generators:
    """The states of Python's, NumPy's and torch's CPU generators, as they are now. About 40 microseconds."""

    def __init__(self) -> None:
        self._states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()

    @classmethod
    def of(cls, states: tuple[Any, Any, Any]) -> Generators:
        """The inverse of `plain`."""
        found = cls()
        found._states = states
        return found

    def plain(self) -> tuple[Any, Any, Any]:
        """Tuples, numbers, an array and a tensor."""
        return self._states

    def restore(self) -> None:
        """Put them back. About 10 microseconds."""
        python, legacy, torch_state = self._states
        random.setstate(python)
        numpy.random.set_state(legacy)
        torch.set_rng_state(torch_state)


class OwnGenerators:
    """Generators that take the place of Python's, NumPy's and torch's for a while, and keep where they are.

    They begin as those are now. About 90 microseconds a time, of which Python's take 80 (reading the state 32, setting
    it 8, twice). NumPy's are exchanged, not copied, which alone would take 140; NumPy then forgets the second of a
    pair of normal numbers.
    """

    def __init__(self) -> None:
        self._put(random.getstate(), numpy.random.get_state(), torch.get_rng_state())

    def _put(self, python: Any, legacy: Any, torch_state: torch.Tensor) -> None:
        self._python, self._torch, self._numpy = python, torch_state, numpy.random.MT19937(0)
        self._numpy.state = {"bit_generator": legacy[0], "state": {"key": legacy[1], "pos": legacy[2]}}

    @classmethod
    def of(cls, states: tuple[Any, Any, Any]) -> OwnGenerators:
        """The inverse of `plain`."""
        found = cls()
        found._put(*states)
        return found

    def plain(self) -> tuple[Any, Any, Any]:
        """Tuples, numbers, an array and a tensor, as `Generators.plain`."""
        state: Any = self._numpy.state
        return self._python, ("MT19937", state["state"]["key"], state["state"]["pos"], 0, 0.0), self._torch

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What draws numbers here draws them from these."""
        python, torch_state, outer = random.getstate(), torch.get_rng_state(), numpy.random.get_bit_generator()  # type: ignore[attr-defined]
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        numpy.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._python, self._torch = random.getstate(), torch.get_rng_state()
            numpy.random.set_bit_generator(outer)  # type: ignore[attr-defined]
            random.setstate(python)
            torch.set_rng_state(torch_state)


@contextmanager
def generators_untouched() -> Iterator[None]:
    """Put Python's, NumPy's and torch's CPU generators back as they were. About 20 microseconds."""
    before = Generators()
    try:
        yield
    finally:
        before.restore()
