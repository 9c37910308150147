"""Normal initial weights from counters: any part of a parameter can be drawn alone, on any device, with the same bits.

torch's generators are sequential: the last weight of a model can be drawn only after all others. Here the value of an
element is a function of a 64-bit key and of the element's index in the whole parameter. So with `strategy=fsdp` each
rank draws only the shards that it keeps, on its device, and one process draws the same bits
(`trainer/strategies/deferred.py`).

The random bits are those of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"),
which mixes `key + index * gamma`. The transform to a normal distribution is the inverse of its cumulative distribution,
linear between 256 points per power of two of the tail's probability: an error of at most 4e-6. Everything is integer
arithmetic, or float additions and multiplications that IEEE 754 defines to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_CHUNK = {"cpu": 2**16, "cuda": 2**24}
"""Elements that are drawn together: on the CPU they stay in its caches."""
_INDEX_BITS = 8
"""Mantissa bits of a tail probability that choose a point of the table; the others interpolate."""
_SHIFT = 23 - _INDEX_BITS
_FIRST = 126 << _INDEX_BITS
"""Table index, before subtraction, of the smallest tail: 0.5 of 2^32."""


def normal_(tensor: Tensor, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Fill `tensor` in place from a normal distribution.

    The key of the draw is the next random number of torch's default generator, so `torch.manual_seed` seeds it.

    Args:
        tensor: Of any shape, and a floating point type.
        std: Standard deviation.
        mean: Mean.
    """
    with _disable_current_modes():
        key = int(torch.randint(2**62, (), device="cpu").item())
    with torch.no_grad():
        torch.ops.trainer.counter_normal_(tensor, mean, std, key)
    return tensor


def fill_normal(
    part: Tensor, mean: float, std: float, key: int, shape: Sequence[int], *, offsets: Sequence[int] | None = None
) -> None:
    """Fill a rectangular part of a tensor with the values that filling all of it would give to that part.

    Args:
        part: Filled in place.
        mean: Mean of the normal distribution.
        std: Its standard deviation.
        key: Key of the draw.
        shape: Shape of the whole tensor.
        offsets: Index of the part's first element in the whole tensor; None: the part is the whole.
    """
    if part.numel() == 0:
        return
    if part.dtype != torch.float32 or not part.is_contiguous():
        values = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        fill_normal(values, mean, std, key, shape, offsets=offsets)
        part.copy_(values)
        return
    flat, run = part.view(-1), _run_length(part.shape, shape)
    chunk = _CHUNK.get(part.device.type, _CHUNK["cpu"])
    if run == part.numel():
        start = _flat_index(shape, offsets)
        for begin in range(0, run, chunk):
            values = flat[begin : begin + chunk]
            _fill(values, _bits_from(start + begin, values.numel(), key, part.device), mean, std)
        return
    starts, columns = _starts(part, shape, offsets, run), torch.arange(run, device=part.device)
    rows = max(1, chunk // run)
    for first in range(0, len(starts), rows):
        index = (starts[first : first + rows, None] + columns).view(-1)
        _fill(flat[first * run : first * run + index.numel()], _bits_at(index, key), mean, std)


@contextmanager
def without_default_init() -> Iterator[None]:
    """Inside this context, linear layers and embeddings draw no initial weights, which would be overwritten."""
    kinds: tuple[type[nn.Linear | nn.Embedding], ...] = (nn.Linear, nn.Embedding)
    originals = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.reset_parameters = original  # type: ignore[method-assign]


def _run_length(part: Sequence[int], whole: Sequence[int]) -> int:
    """Return how many elements of the part are contiguous in the whole tensor."""
    run = 1
    for size, full in zip(reversed(part), reversed(whole), strict=True):
        run *= size
        if size != full:
            break
    return prod(part) if prod(part) == run else run


def _strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _flat_index(shape: Sequence[int], offsets: Sequence[int] | None) -> int:
    return 0 if offsets is None else sum(a * b for a, b in zip(offsets, _strides(shape), strict=True))


def _starts(part: Tensor, shape: Sequence[int], offsets: Sequence[int] | None, run: int) -> Tensor:
    """Return the flat index in the whole tensor of each contiguous run of the part, shape `(runs,)`."""
    starts = torch.tensor([_flat_index(shape, offsets)], device=part.device)
    left = part.numel() // run
    for size, stride in zip(part.shape, _strides(shape), strict=True):
        if left == 1:
            break
        starts = (starts[:, None] + torch.arange(size, device=part.device) * stride).view(-1)
        left //= size
    return starts


def _bits_from(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """Return the random 32 bits of `count` elements that follow each other, as int32."""
    first = start // 2
    words = _mixed(torch.arange(first, (start + count + 1) // 2, device=device), key)
    return words.view(torch.int32)[start - 2 * first :][:count]


def _bits_at(index: Tensor, key: int) -> Tensor:
    """Return the random 32 bits of the elements at `index`, as int32. Each 64-bit word has two of them."""
    halves = (index & 1) * 32
    return (_mixed(index >> 1, key) >> halves).to(torch.int32)


def _mixed(counters: Tensor, key: int) -> Tensor:
    """Return SplitMix64's outputs number `counters`, which are overwritten. int64 arithmetic wraps around."""
    words = counters.mul_(_signed(_GAMMA)).add_(_signed(key + _GAMMA))
    for shift, factor in zip((30, 27, 31), (*_MIX, None), strict=True):
        words ^= (words >> shift) & ((1 << (64 - shift)) - 1)  # the shift of int64 is arithmetic
        if factor is not None:
            words *= _signed(factor)
    return words


def _signed(number: int) -> int:
    """Return the int64 with the same 64 bits."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number


def _fill(values: Tensor, bits: Tensor, mean: float, std: float) -> None:
    """Write the normal values of random bits, shape `(count,)`: one bit is the sign, 31 the tail's probability."""
    points, slopes = _table(values.device)
    tails = (bits & 0x7FFFFFFF).to(torch.float32).add_(0.5).view(torch.int32)
    index = (tails >> _SHIFT).sub_(_FIRST)
    tails &= (1 << _SHIFT) - 1
    torch.index_select(points, 0, index, out=values)
    values.add_(tails.to(torch.float32).mul_(slopes.index_select(0, index)))
    values.view(torch.int32).bitwise_xor_(bits & -0x80000000)
    values.mul_(std).add_(mean)


@cache
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the quantiles of the normal distribution, and their slopes per unit of the remaining mantissa bits."""
    size = 2**_INDEX_BITS
    quantile = NormalDist().inv_cdf
    exact = [quantile(min(0.5, (1 + i / size) * 2.0 ** (octave - 33))) for octave in range(33) for i in range(size)]
    points = torch.tensor([-abs(one) for one in exact], dtype=torch.float64)
    slopes = torch.diff(points, append=torch.zeros(1, dtype=torch.float64)) / 2**_SHIFT
    extra = torch.zeros(1)  # the largest tail, rounded to one half: the median
    return torch.cat([points.float(), extra]).to(device), torch.cat([slopes.float(), extra]).to(device)


_LIBRARY = torch.library.Library("trainer", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "counter_normal_(Tensor(a!) tensor, float mean, float std, int key) -> ()"
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


@torch.library.impl(_LIBRARY, "counter_normal_", "CompositeExplicitAutograd")
def _counter_normal(tensor: Tensor, mean: float, std: float, key: int) -> None:
    if tensor.device.type != "meta":
        fill_normal(tensor, mean, std, key, tensor.shape)
