"""Randomness that is a function of (seed, epoch, sample), so that it survives a resume and a new world size.

Two forms: a hash for whole batches of indices at once, which our own array datasets use for augmentation; and seeding
of Python's, NumPy's and torch's generators around `dataset[i]`, for all other datasets.
"""

from __future__ import annotations

import ctypes
import random
import sys
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
    """Hash integers to 64 well-mixed bits: the finaliser of splitmix64, chained.

    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators" (OOPSLA).
    """
    state = 0
    for number in numbers:
        state = (state + _GOLDEN + number) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def hashed(numbers: numpy.ndarray, key: int | numpy.ndarray) -> numpy.ndarray:
    """Hash uint64 numbers to 64 well-mixed bits: the number `numbers` of the splitmix64 generator seeded with `key`."""
    state = numbers * numpy.uint64(_GOLDEN) + numpy.asarray(key, dtype=numpy.uint64)
    state = (state ^ (state >> numpy.uint64(30))) * numpy.uint64(_FIRST)
    state = (state ^ (state >> numpy.uint64(27))) * numpy.uint64(_SECOND)
    state ^= state >> numpy.uint64(31)
    return state


def uniform(seed: int, epoch: int, indices: torch.Tensor, draws: int) -> torch.Tensor:
    """Draw uniform numbers in [0, 1) for each sample id.

    A sample's numbers do not depend on the other samples of the batch, and no generator is advanced.

    Args:
        seed: Seed of the draws.
        epoch: The epoch.
        indices: Sample ids of shape `(batch,)`.
        draws: Numbers per sample.

    Returns:
        Tensor of shape `(batch, draws)`, float64.
    """
    state = hashed(
        indices.numpy().astype(numpy.uint64)[:, None],
        numpy.array([mix(seed, epoch, draw) for draw in range(draws)], dtype=numpy.uint64),
    )
    return torch.from_numpy((state >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed the generators that `dataset[index]` may draw from.

    Only torch's CPU generator, because `torch.manual_seed` would also reset the generators of the devices.
    """
    bits = mix(seed, epoch, index)
    random.seed(bits)
    numpy.random.seed(bits & 0xFFFFFFFF)
    torch.default_generator.manual_seed(bits >> 1)


class Generators:
    """The current states of Python's, NumPy's and torch's CPU generators. Takes about 40 microseconds."""

    def __init__(self) -> None:
        self._states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()

    @classmethod
    def from_plain(cls, states: tuple[Any, Any, Any]) -> Generators:
        """Build from the states that `plain` returned."""
        generators = cls()
        generators._states = states
        return generators

    def plain(self) -> tuple[Any, Any, Any]:
        """Return the states as tuples, numbers, an array and a tensor."""
        return self._states

    def restore(self) -> None:
        """Set the generators to these states. Takes about 10 microseconds."""
        python, legacy, torch_state = self._states
        random.setstate(python)
        numpy.random.set_state(legacy)
        torch.set_rng_state(torch_state)


class _PythonGenerator:
    """A state that takes turns with that of the `random` module, exchanged as memory.

    `random.getstate` builds and `setstate` reads 625 numbers: 80 microseconds for an exchange there and back, 6% of a
    training step of 1.3 ms. An exchange of memory takes 1. CPython's generator is the object header, an index and 624
    words, in every version from 2.3 to 3.14:
    https://github.com/python/cpython/blob/v3.13.0/Modules/_randommodule.c#L113

    If `has_known_layout` is false, the state is read and set.
    """

    def __init__(self) -> None:
        self._module: Any = random.random.__self__  # type: ignore[attr-defined]
        self._gauss: float | None = self._module.gauss_next
        self._state: Any = random.getstate()
        if _HAS_KNOWN_LAYOUT:
            self._memory = _memory_of(self._module)
            self._words = bytes(self._memory)

    def exchange(self) -> None:
        """Make this the state of the `random` module, and keep the previous one."""
        if not _HAS_KNOWN_LAYOUT:
            before = random.getstate()
            random.setstate(self._state)
            self._state = before
            return
        memory = self._memory
        words = bytes(memory)
        memory[:] = self._words
        self._words = words
        # The second of a pair of normal numbers is kept apart from the words.
        module = self._module
        self._gauss, module.gauss_next = module.gauss_next, self._gauss


_STATE_BYTES = random.Random.__mro__[1].__basicsize__ - object.__basicsize__
"""Size of the state in `_random.Random`."""


def has_known_layout() -> bool:
    """Return whether a generator's state can be copied as memory, tried on a private generator."""
    if sys.implementation.name != "cpython" or not 2500 <= _STATE_BYTES <= 2512:
        return False
    tried = random.Random(0)
    address, before = id(tried) + object.__basicsize__, tried.getstate()
    saved = ctypes.string_at(address, _STATE_BYTES)
    following = [tried.getrandbits(32) for _ in range(1000)]
    ctypes.memmove(address, saved, _STATE_BYTES)
    return tried.getstate() == before and [tried.getrandbits(32) for _ in range(1000)] == following


_HAS_KNOWN_LAYOUT = has_known_layout()


def _memory_of(generator: random.Random) -> memoryview:
    """Return the state in a generator as bytes that can be read and written."""
    address = id(generator) + object.__basicsize__
    return memoryview((ctypes.c_char * _STATE_BYTES).from_address(address)).cast("B")


_get_torch_state, _set_torch_state = torch.default_generator.get_state, torch.default_generator.set_state


class OwnGenerators:
    """Generators that temporarily replace Python's, NumPy's and torch's, and keep their own states.

    A context manager, which cannot be nested in itself: a generator function is 2 microseconds slower. They begin with
    the current states. About 8 microseconds each time: Python's and NumPy's generators are exchanged, not copied. NumPy
    then forgets the second of a pair of normal numbers.
    """

    _outer_torch: torch.Tensor
    _outer_numpy: Any

    def __init__(self) -> None:
        self._python = _PythonGenerator()
        self._put(numpy.random.get_state(), torch.get_rng_state())

    def _put(self, legacy: Any, torch_state: torch.Tensor) -> None:
        self._torch, self._numpy = torch_state, numpy.random.MT19937(0)
        self._numpy.state = {"bit_generator": legacy[0], "state": {"key": legacy[1], "pos": legacy[2]}}

    @classmethod
    def from_plain(cls, states: tuple[Any, Any, Any]) -> OwnGenerators:
        """Build from the states that `plain` returned."""
        made = cls()
        python, legacy, torch_state = states
        made._python.exchange()
        random.setstate(python)
        made._python.exchange()
        made._put(legacy, torch_state)
        return made

    def plain(self) -> tuple[Any, Any, Any]:
        """Return the states as tuples, numbers, an array and a tensor, like `Generators.plain`."""
        self._python.exchange()
        python = random.getstate()
        self._python.exchange()
        state: Any = self._numpy.state
        return python, ("MT19937", state["state"]["key"], state["state"]["pos"], 0, 0.0), self._torch

    def __enter__(self) -> None:
        """Draw all random numbers from these generators until the end of the context."""
        self._outer_torch, self._outer_numpy = _get_torch_state(), numpy.random.get_bit_generator()  # type: ignore[attr-defined]
        self._python.exchange()
        _set_torch_state(self._torch)
        numpy.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        """Continue with the generators from before the context."""
        self._torch = _get_torch_state()
        numpy.random.set_bit_generator(self._outer_numpy)  # type: ignore[attr-defined]
        self._python.exchange()
        _set_torch_state(self._outer_torch)


@contextmanager
def generators_untouched() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's CPU generators at the end of the context. Takes about 20 microseconds."""
    before = Generators()
    try:
        yield
    finally:
        before.restore()
