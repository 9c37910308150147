"""Curves of `metrics.jsonl` in bounded memory: every extreme at its step, and one curve over all attempts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from trainer.runs.curves import Curve, read_curves


def written(tmp_path: Path, lines: list[Any]) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize("most", [1, 7, 120])
@pytest.mark.parametrize("every", [1, 10, 997])
def test_extremes_ends_and_sums_are_exact(most: int, every: int) -> None:
    draw = random.Random(most * every)
    points = [(step, draw.gauss(0, 1)) for step in range(3, 3 + 20_000 * every, every)]
    points[12_345] = (points[12_345][0], 1e6)
    points[17] = (points[17][0], -1e6)
    curve = Curve(most)
    for step, value in points:
        curve.add(step, value)
    assert len(curve.bins) <= 2 * most
    assert (curve.low, curve.high, curve.last) == (points[17], points[12_345], points[-1])
    assert (curve.points()[0], curve.count) == (points[0], len(points))
    assert sum(one.total for one in curve.bins) == pytest.approx(sum(value for _, value in points))
    assert [step for step, _ in curve.points()] == sorted({step for step, _ in curve.points()})
    assert set(curve.points()) <= set(points)
    for before, after in zip(curve.bins, curve.bins[1:], strict=False):
        assert before.last[0] < after.first[0]


def test_a_step_that_comes_again_undoes_what_came_after_it() -> None:
    curve = Curve(8)
    for step in range(100):
        curve.add(step, 5.0)
    curve.add(99, 99.0)  # an extreme that is undone
    for step in range(40, 60):
        curve.add(step, 1.0)
    assert (curve.last, curve.low[1], curve.high) == ((59, 1.0), 1.0, (0, 5.0))
    steps = [step for step, _ in curve.points()]
    assert steps == sorted(set(steps))
    curve.add(0, 2.0)
    assert curve.points() == [(0, 2.0)]


def test_damaged_lines_and_values_are_left_out(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "epoch": 0, "time": 5.0, "a": 1, "b": "nan", "c": "text", "d": None, "e": True, "f": 1e308},
        "not json",
        [1, 2],
        {"step": "x", "a": 9},
        {"step": -1, "a": 9},
        {"step": 2**60, "a": 9},
        {"a": 9},
        {"step": 2, "a": 2.5, "b": "-inf"},
    ]
    path = written(tmp_path, lines)
    with path.open("a") as file:
        file.write('{"step": 3, "a": 7')  # being written
    curves = read_curves(path, 8)
    assert curves.by_name["a"].points() == [(1, 1.0), (2, 2.5)]
    assert (curves.by_name["b"].not_finite, curves.by_name["b"].first_not_finite) == (2, 1)
    assert sorted(curves.by_name) == ["a", "b"]
    assert curves.cut_at is None
    assert read_curves(tmp_path / "none.jsonl", 8).by_name == {}


def test_reading_stops_at_a_deadline_and_at_too_many_metrics(tmp_path: Path) -> None:
    path = written(tmp_path, [{"step": step, "a": 1} for step in range(1, 1000)])
    assert read_curves(path, 8, deadline=0.0).cut_at == 256
    many = written(tmp_path, [{"step": 1, **{f"m{number}": 1 for number in range(5000)}}])
    assert len(read_curves(many, 8).by_name) == 2000
