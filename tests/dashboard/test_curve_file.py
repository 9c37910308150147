"""`metrics.jsonl` by column: converted once, true while it grows, is rewound, and is damaged."""

from __future__ import annotations

import asyncio
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.dashboard import curve_file
from trainer.dashboard import points as points_module
from trainer.dashboard.axes import Axis
from trainer.dashboard.curve_file import CurveFile
from trainer.dashboard.curves import Curves, Request
from trainer.dashboard.smoothing import Smoother
from trainer.runs.metrics_lines import rewind

STEP = Axis("step")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file of some kilobytes has several chunks and an end."""
    monkeypatch.setattr(curve_file, "READ_BYTES", 4000)
    monkeypatch.setattr(curve_file, "MOST_TAIL_BYTES", 3000)
    monkeypatch.setattr(curve_file, "TAIL_BYTES", 1000)


def line(step: int, **metrics: Any) -> str:
    return json.dumps({"step": step, "epoch": step // 100, "time": 1000.0 + step, **metrics})


def write(path: Path, steps: range, mode: str = "w") -> None:
    with path.open(mode) as file:
        for step in steps:
            validation = {} if step % 10 else {"val/acc": step / 9}
            file.write(f"{line(step, **{'train/loss': step / 7}, **validation)}\n")


def points(file: CurveFile, name: str = "train/loss") -> dict[float, float]:
    """What is read now, converting first as the server does."""
    if file.backlog():
        file.convert()
    file.refresh()
    found = [(steps, values) for steps, _, values in file.pieces(name, STEP, -math.inf, math.inf)]
    return {float(step): float(value) for steps, values in found for step, value in zip(steps, values, strict=True)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_all_points_are_read_through_the_cache_and_after_it(source: Path, tmp_path: Path) -> None:
    write(source, range(1, 1001))
    file = CurveFile(source, tmp_path / "a" / "cache")
    assert points(file) == {step: step / 7 for step in range(1, 1001)}
    assert points(file, "val/acc") == {step: step / 9 for step in range(10, 1001, 10)}
    assert file.index is not None
    assert len(file.index.chunks["train/loss"]) > 3
    assert file.count("train/loss") == 1000
    assert file.bounds("val/acc", STEP) == (10, 1000)
    assert [epoch for epoch, _ in file.epochs] == list(range(11))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a" / "cache").iterdir()} == {0o600}


def test_a_growing_file_is_converted_once(source: Path, tmp_path: Path) -> None:
    file = CurveFile(source, tmp_path / "cache")
    assert points(file) == {}
    converted = 0
    for start in range(1, 2001, 100):
        write(source, range(start, start + 100), "a")
        assert points(file) == {step: step / 7 for step in range(1, start + 100)}
        assert file.index is None or file.index.parsed >= converted
        converted = file.index.parsed if file.index else 0
    assert file.index is not None
    assert points(CurveFile(source, tmp_path / "cache")) == points(file)  # another server


def test_a_last_line_that_is_merged_and_one_that_is_being_written(source: Path, tmp_path: Path) -> None:
    write(source, range(1, 501))
    file = CurveFile(source, tmp_path / "cache")
    whole = source.read_bytes()
    source.write_bytes(whole + b'{"step": 501, "time": 1501, "train/lo')
    assert max(points(file)) == 500
    with source.open("r+b") as merged:  # in place, as tracking/metrics_file.py does
        merged.seek(len(whole))
        merged.write(f"{line(501, **{'train/loss': 1.0, 'val/acc': 2.0})}\n".encode())
    assert points(file)[501] == 1.0
    assert points(file, "val/acc")[501] == 2.0


def test_a_run_that_was_killed_five_times_is_one_monotone_curve(source: Path, tmp_path: Path) -> None:
    """Each attempt repeats steps after its checkpoint; the file is rewritten by the resume, as in a run."""
    file = CurveFile(source, tmp_path / "cache")
    for attempt in range(6):
        write(source, range(attempt * 300 + 1, attempt * 300 + 421), "a")
        before = points(file)
        assert list(before) == sorted(before)
        assert len(before) == attempt * 300 + 420
        rewind(source, attempt * 300 + 300)
    assert points(file) == {step: step / 7 for step in range(1, 1801)}


def test_a_file_with_another_content_is_converted_anew(source: Path, tmp_path: Path) -> None:
    write(source, range(1000, 2000))
    file = CurveFile(source, tmp_path / "cache")
    points(file)
    source.write_text("".join(f"{line(step, **{'train/loss': 0.5})}\n" for step in range(3000, 5000)))
    assert points(file) == dict.fromkeys(range(3000, 5000), 0.5)
    write(source, range(1, 700))
    assert points(file) == {step: step / 7 for step in range(1, 700)}


def test_a_rewound_file_is_not_converted_again(source: Path, tmp_path: Path) -> None:
    write(source, range(1, 1001))
    file = CurveFile(source, tmp_path / "cache")
    points(file)
    before = file.index
    rewind(source, 995)
    assert max(points(file)) == 995
    assert file.index == before


def test_steps_that_come_again_in_one_file_replace_those_before(source: Path, tmp_path: Path) -> None:
    write(source, range(1, 1001))
    with source.open("a") as again:
        again.writelines(f"{line(step, **{'train/loss': -1.0})}\n" for step in range(400, 1500))
    file = CurveFile(source, tmp_path / "cache")
    expected = {step: step / 7 if step < 400 else -1.0 for step in range(1, 1500)}
    assert points(file) == expected
    with source.open("a") as again:  # in the part that is not converted
        again.write(f"{line(100, **{'train/loss': 5.0})}\n")
    assert points(file) == {**{step: step / 7 for step in range(1, 100)}, 100: 5.0}


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\xfe garbage",
        b"[1, 2]",
        b'{"step": "x", "train/loss": 1}',
        b'{"step": 1e400, "train/loss": 1}',
        b'{"train/loss": 3}',
        b'{"step": 5, "train/loss": {"a": 1}}',
        b"[" * 100_000,
        b'{"step": 7, "train/loss": ' + b"9" * 5000 + b"}",
        b"x" * 20_000,
    ],
    ids=["bytes", "list", "text as step", "infinite step", "no step", "object", "nested", "long number", "long line"],
)
def test_a_damaged_line_costs_that_line(source: Path, tmp_path: Path, damage: bytes) -> None:
    write(source, range(1, 601))
    lines = source.read_bytes().splitlines()
    source.write_bytes(b"\n".join([*lines[:300], damage, *lines[300:]]) + b"\n")
    found = points(CurveFile(source, tmp_path / "cache"))
    assert set(found) >= set(range(301, 601))
    assert all(math.isfinite(step) for step in found)


def test_names_that_hold_the_step_do_not_fill_the_memory(source: Path, tmp_path: Path) -> None:
    source.write_text("".join(f"{line(step, **{f'grad/{step}': 1.0})}\n" for step in range(5000)))
    file = CurveFile(source, tmp_path / "cache")
    points(file)
    assert len(file.names()) == points_module.MOST_METRICS < 5000


def test_nan_and_infinity_are_counted_not_drawn(source: Path, tmp_path: Path) -> None:
    values = [1.0, "nan", 2.0, "inf", 3.0]
    source.write_text("".join(f"{line(step, loss=value)}\n" for step, value in enumerate(values)))
    curve = asyncio.run(ask(source, tmp_path, Request("loss")))
    assert curve.y.tolist() == [1, 2, 3]
    assert curve.facts["not_finite"] == 2
    assert curve.facts["first_not_finite"] == [1.0, "nan"]


def test_what_nobody_uses_is_deleted(tmp_path: Path) -> None:
    for name in ("gone", "kept", "new"):
        write(tmp_path / name, range(1, 1001))
        points(CurveFile(tmp_path / name, tmp_path / "cache" / name))
        if name != "new":
            os.utime(tmp_path / "cache" / name / "index.json", (1e9, 1e9))
        if name != "kept":
            (tmp_path / name).unlink()
    Curves(tmp_path / "cache").prune()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"kept", "new"}


@pytest.mark.parametrize("damage", ["", "{", '{"version": 99}', '{"points": "../../etc/passwd", "source": ""}'])
def test_a_damaged_cache_is_made_anew(source: Path, tmp_path: Path, damage: str) -> None:
    write(source, range(1, 1001))
    points(CurveFile(source, tmp_path / "cache"))
    (tmp_path / "cache" / "index.json").write_text(damage)
    assert len(points(CurveFile(source, tmp_path / "cache"))) == 1000


def test_a_pipe_as_metrics_does_not_block(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source)
    assert points(CurveFile(source, tmp_path / "cache")) == {}


async def ask(source: Path, tmp_path: Path, request: Request) -> Any:
    curves = Curves(tmp_path / "cache")
    edges = await curves.edges([(source, {})], request)
    assert edges is not None
    return await curves.curve(source, {}, request, edges[0])


def test_smoothing_sees_the_points_that_the_screen_does_not_show(source: Path, tmp_path: Path) -> None:
    """The prototype smoothed what it had sampled: at ten pixels its average was another than at a thousand."""
    random = np.random.default_rng(0).normal(size=2000)
    source.write_text("".join(f"{line(step, loss=value)}\n" for step, value in enumerate(random)))
    few = asyncio.run(ask(source, tmp_path, Request("loss", smoothing=0.95, pixels=10)))
    many = asyncio.run(ask(source, tmp_path, Request("loss", smoothing=0.95, pixels=4000)))
    exact = dict(zip(many.x, many.y, strict=True))
    assert len(few.x) < 300 < len(many.x) == 2000
    assert many.y == pytest.approx(Smoother(0.95)(random), rel=1e-12)
    assert few.y == pytest.approx([exact[x] for x in few.x], rel=1e-12)
    assert (few.raw_y.min(), few.raw_y.max()) == (random.min(), random.max())
    zoomed = asyncio.run(ask(source, tmp_path, Request("loss", smoothing=0.95, pixels=4000, start=1500, end=1600)))
    assert zoomed.y == pytest.approx([exact[x] for x in zoomed.x], rel=1e-9)
    assert zoomed.x.tolist() == list(range(1499, 1602))
    assert zoomed.facts["count"] == 101


def test_many_requests_start_one_conversion(source: Path, tmp_path: Path) -> None:
    """The prototype's stampede: forty charts that opened at once indexed the same file forty times."""
    write(source, range(1, 1001))

    async def stampede() -> int:
        curves = Curves(tmp_path / "cache")
        await asyncio.gather(*(ask_of(curves) for _ in range(40)))
        return curves.started

    async def ask_of(curves: Curves) -> None:
        edges = await curves.edges([(source, {})], Request("train/loss"))
        assert edges is not None
        assert len((await curves.curve(source, {}, Request("train/loss"), edges[0])).x) == 1000

    assert asyncio.run(stampede()) == 1


def test_a_large_file_is_converted_by_one_other_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is converted so far is shown meanwhile; two dashboards do not convert the same file twice."""
    monkeypatch.undo()  # the other process has the real sizes
    monkeypatch.setattr("trainer.dashboard.curves.IN_PROCESS_BYTES", 1 << 20)
    write(source, range(1, 40_001))
    assert source.stat().st_size > 2 << 20

    async def until_done() -> tuple[int, list[float]]:
        two = [Curves(tmp_path / "cache") for _ in range(2)]
        shares = []
        for _ in range(600):
            request = Request("train/loss", pixels=4000)
            for curves in two:
                edges = await curves.edges([(source, {})], request)
                assert edges is not None
                curve = await curves.curve(source, {}, request, edges[0])
                shares.append(curve.facts["progress"])
            if shares[-2:] == [1.0, 1.0] and curve.facts["count"] == 40_000:
                break
            await asyncio.sleep(0.1)
        assert curve.facts["count"] == 40_000
        started = [curves.started for curves in two]
        for curves in two:
            await curves.close()
        return max(started), shares

    started, shares = asyncio.run(until_done())
    assert started == 1
    assert shares[0] < 1
    (points_file,) = next((tmp_path / "cache").iterdir()).glob("points-*")
    assert points_file.stat().st_size < 24 * 1.2 * 40_000 * 1.1
