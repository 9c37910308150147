"""Answer requests for curves: one conversion per file, a bounded number of files in memory, work in threads."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core import processes
from trainer.dashboard.aggregate import Band, aggregate
from trainer.dashboard.axes import Axis, AxisName, axis_of, is_drawable
from trainer.dashboard.curve_file import CurveFile
from trainer.dashboard.downsample import Downsampler
from trainer.dashboard.points import Array
from trainer.dashboard.smoothing import Smoother

IN_PROCESS_BYTES = 8 << 20
"""What is larger is converted by a process of its own."""
_MOST_FILES, _MOST_POINTS = 512, 1_500_000
"""Ends of files that stay in memory: so many, or with so many points."""
_UNUSED_S = 30 * 86400.0
_CONVERSIONS, _READERS = 2, 2


@dataclass(frozen=True)
class Request:
    """What is to be drawn."""

    metric: str
    axis: AxisName = "step"
    start: float | None = None
    """Left edge; None: the first point of all runs."""
    end: float | None = None
    pixels: int = 600
    smoothing: float = 0.0
    log_x: bool = False
    band: Band = "deviation"


@dataclass
class Curve:
    """A line: its points, and what a reader should know about those that are not drawn."""

    x: Array = field(default_factory=lambda: np.empty(0))
    y: Array = field(default_factory=lambda: np.empty(0))
    raw_x: Array | None = None
    """The points before smoothing; None: they are not smoothed."""
    raw_y: Array | None = None
    low: Array | None = None
    high: Array | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Curves:
    """The curves of all runs.

    Args:
        cache: Folder of the cache.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._files: OrderedDict[Path, CurveFile] = OrderedDict()
        self._locks: dict[Path, asyncio.Lock] = {}
        self._conversions: dict[Path, asyncio.Task[None]] = {}
        self._few_conversions = asyncio.Semaphore(_CONVERSIONS)
        self._few_readers = asyncio.Semaphore(_READERS)
        self.started = 0
        """Number of conversions so far."""

    async def names(self, source: Path) -> list[str]:
        """Return the metrics of a run."""
        async with self._lock(source):
            return (await self._current(source)).names()

    async def curve(self, source: Path, row: dict[str, Any], request: Request, edges: tuple[float, float]) -> Curve:
        """Return the curve of a run between two edges. See `edges`."""
        async with self._lock(source), self._few_readers:
            file = await self._current(source)
            curve = await asyncio.to_thread(_read, file, row, request, edges)
        curve.facts["progress"] = 1.0 if source not in self._conversions else self._progress(file)
        return curve

    async def edges(
        self, runs: Sequence[tuple[Path, dict[str, Any]]], request: Request
    ) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Return the edges that are asked for, and those of all points of the runs; None without points."""
        found = []
        for source, row in runs:
            async with self._lock(source):
                file = await self._current(source)
                axis = axis_of(request.axis, row, file.epochs, file.first_time)
                bounds = file.bounds(request.metric, axis) if axis else None
            if bounds:
                found.append(bounds)
        if not found:
            return None
        whole = min(one[0] for one in found), max(one[1] for one in found)
        start = whole[0] if request.start is None else request.start
        end = whole[1] if request.end is None else request.end
        return (start, max(end, start)), whole

    async def band(
        self, runs: Sequence[tuple[Path, dict[str, Any]]], request: Request, edges: tuple[float, float]
    ) -> Curve:
        """Return the mean of the runs and a band around it."""
        members = []
        for source, row in runs:
            async with self._lock(source), self._few_readers:
                file = await self._current(source)
                points = await asyncio.to_thread(_whole, file, row, request, edges)
            if len(points[0]):
                members.append(points)
        x, mean, low, high = await asyncio.to_thread(aggregate, members, edges, request.pixels, request.band)
        return Curve(x, mean, low=low, high=high, facts={"runs": len(members), "count": len(x)})

    def prune(self) -> None:
        """Delete what was converted of files that do not exist any more, and was not used for a month."""
        for path in self._cache.glob("*/index.json"):
            try:
                is_old = time.time() - path.stat().st_mtime > _UNUSED_S
                source = CurveFile(Path(), path.parent).index if is_old else None
                if source and not os.path.exists(source.source):
                    shutil.rmtree(path.parent)
            except OSError:
                continue

    async def close(self) -> None:
        """End the conversions."""
        for task in self._conversions.values():
            task.cancel()
        await asyncio.gather(*self._conversions.values(), return_exceptions=True)

    def _lock(self, source: Path) -> asyncio.Lock:
        return self._locks.setdefault(source, asyncio.Lock())

    async def _current(self, source: Path) -> CurveFile:
        """Return the file with what can be read now. The caller holds its lock."""
        file = self._files.get(source)
        if file is None:
            file = await asyncio.to_thread(CurveFile, source, self._folder(source))
            self._files[source] = file
        self._files.move_to_end(source)
        if source in self._conversions:
            await asyncio.to_thread(file.load)
        elif backlog := await asyncio.to_thread(file.backlog):
            if backlog <= IN_PROCESS_BYTES:
                self.started += 1
                await asyncio.to_thread(file.convert)
            else:
                self._conversions[source] = asyncio.create_task(self._convert(source))
        await asyncio.to_thread(file.refresh)
        while len(self._files) > _MOST_FILES or sum(map(len, self._files.values())) > _MOST_POINTS:
            if len(self._files) == 1:
                break
            self._files.popitem(last=False)
        return file

    async def _convert(self, source: Path) -> None:
        """Run the one conversion of a file; when it has ended, the next request uses its result."""
        process = None
        try:
            async with self._few_conversions:
                self.started += 1
                command = processes.python_module("trainer.dashboard.convert", str(source), str(self._folder(source)))
                process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
                await process.wait()
            file = self._files.get(source)
            if file is not None:
                await asyncio.to_thread(file.load)
        finally:
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
            self._conversions.pop(source, None)

    def _progress(self, file: CurveFile) -> float:
        try:
            size = os.stat(file.source).st_size
        except OSError:
            return 1.0
        return min(0.999, (file.index.parsed if file.index else 0) / max(size, 1))

    def _folder(self, source: Path) -> Path:
        return self._cache / hashlib.sha256(os.fsencode(source)).hexdigest()[:32]


def _read(file: CurveFile, row: dict[str, Any], request: Request, edges: tuple[float, float]) -> Curve:
    axis = axis_of(request.axis, row, file.epochs, file.first_time)
    if axis is None:
        return Curve(facts={"count": 0, "no_axis": True})
    smoother = Smoother(request.smoothing)
    shown, raw = _sampler(request, edges), _sampler(request, edges)
    facts: dict[str, Any] = {"not_finite": 0}
    pieces = file.pieces(request.metric, axis, *edges, smoother.history)
    window = Window(*edges)
    for x, y in _finite(pieces, axis, facts):
        averages = smoother(y) if request.smoothing else y
        for part_x, part_raw, part_shown in window.of(x, y, averages):
            shown.add(part_x, part_shown)
            if request.smoothing:
                raw.add(part_x, part_raw)
    facts["count"] = window.count
    curve = Curve(*shown.points(), facts=facts)
    if request.smoothing:
        curve.raw_x, curve.raw_y = raw.points()
    return curve


def _whole(file: CurveFile, row: dict[str, Any], request: Request, edges: tuple[float, float]) -> tuple[Array, Array]:
    """Return the points of a member of a band; of a long curve as many as there are pixels, each the mean of some."""
    axis = axis_of(request.axis, row, file.epochs, file.first_time)
    if axis is None:
        return np.empty(0), np.empty(0)
    smoother = Smoother(request.smoothing)
    xs, ys = [], []
    for x, y in _finite(file.pieces(request.metric, axis, *edges, smoother.history), axis, {"not_finite": 0}):
        inside = _inside(x, edges)
        y = smoother(y) if request.smoothing else y
        step = max(1, (inside.stop - inside.start) // 4096)
        starts = np.arange(inside.start, inside.stop, step)
        if not len(starts):
            continue
        counts = np.diff(np.append(starts, inside.stop))
        xs.append(x[starts] if step == 1 else np.add.reduceat(x[: inside.stop], starts) / counts)
        ys.append(y[starts] if step == 1 else np.add.reduceat(y[: inside.stop], starts) / counts)
    return (np.concatenate(xs), np.concatenate(ys)) if xs else (np.empty(0), np.empty(0))


def _sampler(request: Request, edges: tuple[float, float]) -> Downsampler:
    return Downsampler(edges[0], edges[1], request.pixels, log=request.log_x)


def _finite(pieces: Any, axis: Axis, facts: dict[str, Any]) -> Any:
    """Yield x and y of the finite points; count those whose y is not, and note where the first one is."""
    for steps, times, values in pieces:
        x = axis.of(steps, times)
        drawable = is_drawable(x)
        x, values = x[drawable], values[drawable]
        finite = np.isfinite(values)
        if not finite.all():
            facts["not_finite"] += int(len(values) - finite.sum())
            facts.setdefault("first_not_finite", [float(x[~finite][0]), str(values[~finite][0])])
            x, values = x[finite], values[finite]
        yield x, values


class Window:
    """Cuts pieces to the points between two edges, and the nearest on each side: the line continues beyond the edge."""

    def __init__(self, start: float, end: float) -> None:
        self._start, self._end = start, end
        self._before: tuple[Array, ...] | None = None
        self._is_over = False
        self.count = 0
        """Number of points between the edges."""

    def of(self, x: Array, *columns: Array) -> Iterator[tuple[Array, ...]]:
        """Yield x and the columns of what belongs to the window, in parts."""
        begin = int(np.searchsorted(x, self._start, side="left"))
        end = int(np.searchsorted(x, self._end, side="right"))
        if begin > 0:
            self._before = tuple(column[begin - 1 : begin] for column in (x, *columns))
        if begin < len(x) and self._before is not None and not self._is_over:
            yield self._before
            self._before = None
        if self._is_over or begin >= len(x):
            return
        self._is_over = end < len(x)
        self.count += end - begin
        yield tuple(column[begin : end + 1] for column in (x, *columns))


def _inside(x: Array, edges: tuple[float, float]) -> slice:
    """Return the points between the edges, and one more on each side: the line continues beyond the edge."""
    begin = int(np.searchsorted(x, edges[0], side="left"))
    end = int(np.searchsorted(x, edges[1], side="right"))
    return slice(max(0, begin - 1), min(len(x), end + 1))
