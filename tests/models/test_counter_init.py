"""Initial weights from counters: any part has the bits of the whole, and they are normal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.models.counter_init import _fill, fill_normal, normal_, without_default_init

SHAPE, KEY = (7, 11, 5), 2**61 + 12345


@pytest.mark.parametrize(
    ("offsets", "shape"),
    [
        ((2, 3, 1), (4, 5, 3)),
        ((3, 0, 0), (3, 11, 5)),
        ((0, 3, 0), (7, 4, 5)),
        ((6, 10, 4), (1, 1, 1)),
        ((3, 2, 0), (1, 3, 5)),
        ((0, 0, 1), (7, 11, 1)),
        ((2, 2, 2), (0, 2, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_has_the_bits_of_the_whole(offsets: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole, part = torch.empty(SHAPE, dtype=dtype), torch.empty(shape, dtype=dtype)
    fill_normal(whole, 0.5, 2.0, KEY, SHAPE)
    fill_normal(part, 0.5, 2.0, KEY, SHAPE, offsets=offsets)
    inside = tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
    assert torch.equal(part, whole[inside])


def test_the_bits_stay_what_they_are() -> None:
    """A change would give other weights to every new run."""
    found = torch.empty(4)
    fill_normal(found, 0.0, 1.0, KEY, found.shape)
    words = [_split_mix(KEY, index) for index in (0, 1)]
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    tails = torch.tensor([((half & 0x7FFFFFFF) + 0.5) / 2**32 for half in halves], dtype=torch.float64)
    signs = torch.tensor([1.0 if half >> 31 else -1.0 for half in halves], dtype=torch.float64)
    torch.testing.assert_close(found.double(), -signs * torch.special.ndtri(tails), rtol=0, atol=4e-6)


def _split_mix(key: int, index: int) -> int:
    """SplitMix64 as published, in Python's integers."""
    word = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_the_transform_is_the_inverse_of_the_normal_distribution() -> None:
    bits = torch.cat([torch.arange(0, 2**31, 99_991), torch.arange(300), 2**31 - 1 - torch.arange(300)])
    found = torch.empty(len(bits))
    _fill(found, bits.to(torch.int32), 0.0, 1.0)
    expected = torch.special.ndtri((bits.double() + 0.5) / 2**32)
    assert (found - expected).abs().max() < 4e-6
    _fill(mirrored := torch.empty(len(bits)), (bits - 2**31).to(torch.int32), 0.0, 1.0)
    assert torch.equal(mirrored, -found)


def test_the_values_are_normal_and_independent() -> None:
    torch.manual_seed(1)
    first, second = (normal_(torch.empty(1000, 1001)).double().view(-1) for _ in range(2))
    for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert (first**moment).mean().item() == pytest.approx(expected, abs=0.03)
    uniform = torch.special.ndtr(first).sort().values
    distance = (uniform - (torch.arange(len(uniform)) + 0.5) / len(uniform)).abs().max()  # Kolmogorov-Smirnov
    assert distance * len(uniform) ** 0.5 < 1.63  # exceeded by one sample in a hundred
    for lag in (1, 2, 3, 1001):
        assert abs((first[lag:] * first[:-lag]).mean()) < 0.004
    assert abs((first * second).mean()) < 0.004


def test_the_seed_is_torchs() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return normal_(torch.empty(5))

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_fake_and_meta_tensors_are_accepted() -> None:
    with FakeTensorMode():
        assert normal_(torch.empty(3)).shape == (3,)
    assert normal_(torch.empty(3, device="meta")).is_meta


def test_default_weights_are_not_drawn_inside_and_are_drawn_after() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with without_default_init():
        nn.Linear(3, 3), nn.Embedding(3, 3)
    assert torch.equal(torch.get_rng_state(), before)
    nn.Linear(3, 3)
    assert not torch.equal(torch.get_rng_state(), before)
