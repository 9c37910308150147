"""What a screen shows of a curve: every extreme, and an average of all points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.dashboard.aggregate import aggregate
from trainer.dashboard.axes import axis_of
from trainer.dashboard.downsample import Downsampler
from trainer.dashboard.smoothing import Smoother

PIXELS = 500


@pytest.fixture(scope="module")
def curve() -> tuple[np.ndarray, np.ndarray]:
    """A million points, and single spikes in both directions between them."""
    random = np.random.default_rng(3)
    y = random.normal(size=1_000_000)
    y[random.integers(0, len(y), 40)] += 50 * random.choice([-1, 1], 40)
    return np.arange(len(y), dtype=float), y


def test_every_pixel_keeps_its_first_smallest_largest_and_last_point(curve: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = curve
    sampler = Downsampler(x[0], x[-1], PIXELS)
    sampler.add(x, y)
    kept_x, kept_y = sampler.points()
    assert len(kept_x) <= 4 * PIXELS
    assert (np.diff(kept_x) > 0).all()
    assert (y[kept_x.astype(int)] == kept_y).all()
    edges = np.linspace(x[0], x[-1], PIXELS + 1)
    for left, right in itertools.pairwise(edges):
        inside = (x >= left) & (x < right) if right < x[-1] else x >= left
        mine = kept_y[(kept_x >= left) & (kept_x < right) if right < x[-1] else kept_x >= left]
        assert (mine[0], mine[-1]) == (y[inside][0], y[inside][-1])
        assert (mine.min(), mine.max()) == (y[inside].min(), y[inside].max())


@pytest.mark.parametrize("pieces", [2, 7, 5000])
def test_pieces_lose_no_extreme(curve: tuple[np.ndarray, np.ndarray], pieces: int) -> None:
    x, y = curve[0][:40_000], curve[1][:40_000]
    sampler = Downsampler(x[0], x[-1], 50)
    for part_x, part_y in zip(np.array_split(x, pieces), np.array_split(y, pieces), strict=True):
        sampler.add(part_x, part_y)
    kept_x, kept_y = sampler.points()
    edges = np.linspace(x[0], x[-1], 51)
    pixel, mine = np.searchsorted(edges[1:-1], x, "right"), np.searchsorted(edges[1:-1], kept_x, "right")
    for number in range(50):
        assert kept_y[mine == number].max() == y[pixel == number].max()
        assert kept_y[mine == number].min() == y[pixel == number].min()


def test_a_short_curve_is_returned_unchanged() -> None:
    x = np.sort(np.random.default_rng(0).uniform(size=300))
    sampler = Downsampler(0.0, 1.0, 200)
    sampler.add(x, np.sin(9 * x))
    assert (sampler.points()[0] == x).all()


def test_pixels_of_a_logarithmic_axis_have_equal_ratios() -> None:
    x = np.arange(1.0, 100_001.0)
    sampler = Downsampler(1.0, 1e5, 100, log=True)
    sampler.add(x, np.zeros_like(x))
    kept = sampler.points()[0]
    per_decade = [int(((kept >= 10.0**k) & (kept < 10.0 ** (k + 1))).sum()) for k in range(2, 5)]
    assert max(per_decade) <= 2 * min(per_decade)


@pytest.mark.parametrize("weight", [0.3, 0.6, 0.9, 0.99, 0.999])
def test_smoothing_is_the_corrected_average_of_all_points(weight: float) -> None:
    y = np.random.default_rng(1).normal(size=3000) + 5
    smoother = Smoother(weight)
    found = np.concatenate([smoother(part) for part in np.array_split(y, 7)])
    above = below = 0.0
    for place, value in enumerate(y):
        above, below = weight * above + value, weight * below + 1
        assert found[place] == pytest.approx(above / below, rel=1e-12)


def test_a_range_is_smoothed_as_in_the_whole_curve() -> None:
    y = np.random.default_rng(2).normal(size=20_000)
    whole, part = Smoother(0.99), Smoother(0.99)
    start = 15_000 - part.history
    assert part(y[start:])[part.history :] == pytest.approx(whole(y)[15_000:], rel=1e-9, abs=1e-11)


def test_a_band_is_that_of_the_runs_that_have_a_point_there() -> None:
    x = np.arange(5.0)
    runs = [(x, x * 0 + 1), (x, x * 0 + 3), (x[:2], x[:2] * 0 + 8)]
    at, mean, low, high = aggregate(runs, (0.0, 4.0), 100, "range")
    assert (at == x).all()
    assert mean.tolist() == [4, 4, 2, 2, 2]
    assert (low.tolist(), high.tolist()) == ([1] * 5, [8, 8, 3, 3, 3])
    _, _, low, high = aggregate(runs[:2], (0.0, 4.0), 100, "deviation")
    assert high - low == pytest.approx([2 * 2**0.5] * 5)
    _, _, low, high = aggregate(runs[:2], (0.0, 4.0), 100, "error")
    assert high - low == pytest.approx([2.0] * 5)


def test_axes_follow_from_what_the_run_recorded() -> None:
    steps, times = np.array([0.0, 50.0, 100.0, 150.0]), np.array([1000.0, 1010.0, 1020.0, 1030.0])
    row = {"batch_size": 8, "metrics": {"train/tokens_per_s": 640.0, "train/samples_per_s": 10.0}}
    epochs = [[0.0, 100.0], [1.0, 150.0]]
    found = {}
    for name in ("step", "time", "date", "epoch", "samples", "tokens"):
        axis = axis_of(name, row, epochs, 1000.0)  # type: ignore[arg-type]
        assert axis is not None
        found[name] = axis.of(steps, times).tolist()
    assert found["time"] == [0, 10, 20, 30]
    assert found["date"] == times.tolist()
    assert found["epoch"] == [0, 0.5, 1, 1.5]
    assert found["samples"] == [0, 400, 800, 1200]
    assert found["tokens"] == [0, 25600, 51200, 76800]
    assert axis_of("tokens", {"batch_size": 8, "metrics": {}}, epochs, 0.0) is None
    assert axis_of("epoch", row, [], 0.0) is None
