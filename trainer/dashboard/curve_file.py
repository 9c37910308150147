"""The points of a run's metrics by column: its `metrics.jsonl`, most of it converted once into a private cache.

A cache folder has two files. `index.json` says which part of `metrics.jsonl` has been converted, and where the points
of each metric are in the file of points: per chunk the steps, then the times, then the values, as 64-bit floats. The
end of `metrics.jsonl` is parsed whenever it is read: its last line may change (`tracking/metrics_file.py` merges into
it).
A file that a resume has cut is still good for what was converted before; one with another content is converted anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.core import records
from trainer.core.files import open_regular, write_atomic
from trainer.dashboard.axes import Axis, is_drawable
from trainer.dashboard.points import Array, Columns, parse_lines
from trainer.runs.metrics_lines import MOST_METRICS

READ_BYTES = 4 << 20
"""Bytes of `metrics.jsonl` that are parsed at once, and then form a chunk of each metric."""
MOST_TAIL_BYTES, TAIL_BYTES = 1 << 20, 64 << 10
"""The end of the file that is parsed again at each change may be so long; it is this long after a conversion."""
MOST_CHUNKS = 4096
"""A file with more chunks of one metric was converted in too small parts, while it grew: it is converted anew."""
_CHECKED_BYTES = 4096
_WRITE_EVERY_S = 0.5
_LONGEST_LINE = 4 << 20


@dataclass(frozen=True, kw_only=True)
class CurveIndex:
    """What has been converted: `index.json` of a cache folder."""

    source: str
    """Path of the `metrics.jsonl`."""
    parsed: int = 0
    """Bytes of it that were converted."""
    check: str = ""
    """Hash of the bytes before `parsed`, by which a file that was rewritten is noticed."""
    points: str
    """Name of the file of points."""
    chunks: dict[str, list[list[float]]] = field(default_factory=dict)
    """By metric: offset, number of points, how many of them count, first and last step, first and last time."""
    epochs: list[list[float]] = field(default_factory=list)
    first_time: float | None = None
    last_step: float | None = None


class CurveFile:
    """Reads the curves of one run.

    Args:
        source: The `metrics.jsonl`.
        folder: Its cache folder; made with mode 0700 when it is needed.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self._folder = source, folder
        self._index_path = folder / "index.json"
        self.index = self._read_index()
        self._tail, self._tail_of = Columns(), (-1, -1)

    def backlog(self) -> int:
        """Return how many bytes would be converted now."""
        try:
            with open_regular(self.source) as file:
                status = os.fstat(file.fileno())
                index = self.index if self._is_current(self.index, file.fileno()) else None
        except OSError:
            return 0
        left = status.st_size - (index.parsed if index else 0)
        return left if left > MOST_TAIL_BYTES else 0

    def load(self) -> None:
        """Use what another process has converted in the meantime."""
        index = self._read_index()
        if index != self.index:
            self.index, self._tail_of = index, (-1, -1)

    def convert(self) -> None:
        """Convert the new part of the file except its end. One process at a time does so; others wait for it."""
        with self._locked():
            self.load()
            try:
                file = open_regular(self.source)
            except OSError:
                return
            with file:
                is_current = self._is_current(self.index, file.fileno())
                if self.index is None or not is_current or _most_chunks(self.index) > MOST_CHUNKS:
                    self._start_anew()
                size = os.fstat(file.fileno()).st_size
                written = time.monotonic()
                while self.index is not None and self.index.parsed + TAIL_BYTES < size:
                    if not self._convert_part(file.fileno(), size - TAIL_BYTES):
                        break
                    if time.monotonic() - written > _WRITE_EVERY_S:
                        self._write_index()
                        written = time.monotonic()
                self._write_index()

    def refresh(self) -> None:
        """Parse the end of the file if it has changed."""
        try:
            with open_regular(self.source) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) == self._tail_of:
                    return
                start = self.index.parsed if self._is_current(self.index, file.fileno()) and self.index else 0
                if self.index and not start:
                    self.index = None
                tail = self._columns_after()
                # While a large file is being converted, its beginning is shown and its end is not.
                text = os.pread(file.fileno(), min(status.st_size - start, MOST_TAIL_BYTES), start)
        except OSError:
            self.index, self._tail = None, Columns()
            return
        for line in parse_lines(_complete(text, is_end=start + len(text) >= status.st_size)):
            tail.add(line)
        self._tail, self._tail_of = tail, (status.st_size, status.st_mtime_ns)

    def names(self) -> list[str]:
        """Return the names of the metrics, in the order in which they were first logged."""
        names = dict.fromkeys([*(self.index.chunks if self.index else ()), *self._tail.metrics])
        return list(names)[:MOST_METRICS]

    @property
    def epochs(self) -> list[list[float]]:
        """`[epoch, last step of it]`, ascending."""
        return self._tail.epochs

    @property
    def first_time(self) -> float | None:
        """The time of the first line, in seconds since 1970."""
        return self._tail.first_time

    def pieces(self, name: str, axis: Axis, start: float, end: float, history: int = 0) -> Pieces:
        """Return a reader of the points of a metric in a range, with at least one more on each side.

        Args:
            name: The metric.
            axis: What x is.
            start: The smallest x.
            end: The largest x.
            history: Number of points before the range that are read, too.
        """
        cut = self._tail.rewound_to  # the end of the file undoes converted points
        chunks = [one for one in self.index.chunks.get(name, []) if one[3] < cut] if self.index else []
        bounds = axis.of(np.array([one[3:5] for one in chunks]), np.array([one[5:7] for one in chunks]))
        inside = [number for number, (low, high) in enumerate(bounds.tolist()) if low <= end and high >= start]
        first, last = (inside[0], inside[-1]) if inside else (len(chunks), len(chunks))
        wanted = max(history, 1)
        while first > 0 and wanted > 0:
            first -= 1
            wanted -= int(chunks[first][2])
        path = self._folder / self.index.points if self.index else self._folder
        return Pieces(path, chunks[first : last + 2], self._tail.arrays(name), cut)

    def count(self, name: str) -> int:
        """Return the number of points of a metric."""
        chunks = self.index.chunks.get(name, []) if self.index else []
        return sum(int(one[2]) for one in chunks) + len(self._tail.arrays(name)[0])

    def __len__(self) -> int:
        """Return the number of points in memory."""
        return len(self._tail)

    def bounds(self, name: str, axis: Axis) -> tuple[float, float] | None:
        """Return the smallest and the largest x of a metric; None without points that can be drawn."""
        steps, times, _ = self._tail.arrays(name)
        chunks = self.index.chunks.get(name, []) if self.index else []
        ends = [axis.of(np.array(one[3:5]), np.array(one[5:7])) for one in (chunks[:1] + chunks[-1:])]
        x = np.concatenate([*ends, axis.of(steps, times)])
        x = x[is_drawable(x)]
        return (float(x.min()), float(x.max())) if len(x) else None

    def _columns_after(self) -> Columns:
        """Return empty columns that continue the converted part."""
        if self.index is None:
            return Columns()
        epochs = [list(one) for one in self.index.epochs]
        last_step = -math.inf if self.index.last_step is None else self.index.last_step
        return Columns(epochs=epochs, first_time=self.index.first_time, last_step=last_step)

    def _convert_part(self, descriptor: int, end: int) -> bool:
        """Convert up to `CHUNK_LINES` lines or `READ_BYTES` that end before `end`; returns whether there were any."""
        assert self.index is not None
        start = self.index.parsed
        text = os.pread(descriptor, min(READ_BYTES, end - start), start)
        text = text[: text.rfind(b"\n") + 1]
        if not text:  # a line of 4 MB is no line of ours: skipped to its end
            text = os.pread(descriptor, _LONGEST_LINE, start)
            length = text.find(b"\n") + 1 or len(text)
            if not length or start + length > end:
                return False
            self._save(Columns(), start + length, descriptor)
            return True
        columns = self._columns_after()
        for line in parse_lines(text.split(b"\n")[:-1]):
            columns.add(line)
        self._save(columns, start + len(text), descriptor)
        return True

    def _save(self, columns: Columns, parsed: int, descriptor: int) -> None:
        """Append the points of a part to the file of points, then replace the index."""
        assert self.index is not None
        chunks = {name: list(found) for name, found in self.index.chunks.items()}
        if columns.rewound_to < math.inf:
            chunks = {name: self._before(found, columns.rewound_to) for name, found in chunks.items()}
        output = os.open(self._folder / self.index.points, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(output, "ab") as file:
            offset = file.seek(0, os.SEEK_END)
            for name in columns.metrics:
                steps, times, values = columns.arrays(name)
                if not len(steps) or (name not in chunks and len(chunks) >= MOST_METRICS):
                    continue
                bounds = [float(column[place]) for column in (steps, times) for place in (0, -1)]
                place: list[float] = [
                    offset,
                    len(steps),
                    len(steps),
                    *(one if math.isfinite(one) else 0.0 for one in bounds),
                ]
                chunks.setdefault(name, []).append(place)
                for column in (steps, times, values):
                    offset += file.write(column.tobytes())
        self.index = CurveIndex(
            source=str(self.source),
            parsed=parsed,
            check=_check(descriptor, parsed),
            points=self.index.points,
            chunks=chunks,
            epochs=columns.epochs or self.index.epochs,
            first_time=columns.first_time if columns.first_time is not None else self.index.first_time,
            last_step=columns.last_step if math.isfinite(columns.last_step) else self.index.last_step,
        )

    def _write_index(self) -> None:
        """Replace the index, once the points that it names are on disk."""
        assert self.index is not None
        points = self._folder / self.index.points
        descriptor = os.open(points, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        write_atomic(self._index_path, records.dumps(self.index))

    def _before(self, chunks: list[list[float]], step: float) -> list[list[float]]:
        """Return the chunks without the points from a step on."""
        assert self.index is not None
        kept = []
        for one in chunks:
            if one[4] >= step:
                with open_regular(self._folder / self.index.points) as file:
                    steps, times, _ = _read_chunk(file.fileno(), int(one[0]), int(one[1]))
                count = int(np.searchsorted(steps[: int(one[2])], step))
                if not count:
                    continue
                one = [*one[:2], count, one[3], float(steps[count - 1]), one[5], float(times[count - 1])]
            kept.append(one)
        return kept

    def _start_anew(self) -> None:
        for old in self._folder.glob("points-*"):
            old.unlink(missing_ok=True)  # a reader that has it open reads on
        self.index = CurveIndex(source=str(self.source), points=f"points-{secrets.token_hex(4)}")
        self._tail_of = (-1, -1)

    def _read_index(self) -> CurveIndex | None:
        try:
            index = records.read(CurveIndex, self._index_path)
        except records.BadRecord:
            return None
        return index if index and "/" not in index.points and (self._folder / index.points).is_file() else None

    @staticmethod
    def _is_current(index: CurveIndex | None, descriptor: int) -> bool:
        """Return whether the converted part is still the beginning of the file."""
        if index is None:
            return False
        return os.fstat(descriptor).st_size >= index.parsed and _check(descriptor, index.parsed) == index.check

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the cache folder, which is made if it is missing."""
        for folder in (*reversed(self._folder.parents), self._folder):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Pieces:
    """The points of a metric, chunk by chunk, so that ten million of them need the memory of one chunk.

    Args:
        path: The file of points.
        chunks: The chunks to read.
        tail: Steps, times and values after the chunks.
        cut: Points of the chunks from this step on were undone.
    """

    def __init__(self, path: Path, chunks: list[list[float]], tail: tuple[Array, Array, Array], cut: float) -> None:
        self._path, self._chunks, self._tail, self._cut = path, chunks, tail, cut

    def __iter__(self) -> Iterator[tuple[Array, Array, Array]]:
        """Yield steps, times and values."""
        if self._chunks:
            with open_regular(self._path) as file:
                for chunk in self._chunks:
                    steps, times, values = _read_chunk(file.fileno(), int(chunk[0]), int(chunk[1]))
                    keep = int(chunk[2])
                    if chunk[4] >= self._cut:
                        keep = int(np.searchsorted(steps[:keep], self._cut))
                    yield steps[:keep], times[:keep], values[:keep]
        if len(self._tail[0]):
            yield self._tail


def _read_chunk(descriptor: int, offset: int, count: int) -> Array:
    data = os.pread(descriptor, 24 * count, offset)
    if len(data) < 24 * count:  # replaced or cut short since the index was read
        return np.empty((3, 0))
    return np.frombuffer(data, dtype=np.float64).reshape(3, count)


def _most_chunks(index: CurveIndex) -> int:
    return max(map(len, index.chunks.values()), default=0)


def _check(descriptor: int, end: int) -> str:
    start = max(0, end - _CHECKED_BYTES)
    return hashlib.sha256(os.pread(descriptor, end - start, start)).hexdigest()


def _complete(text: bytes, *, is_end: bool) -> list[bytes]:
    """Return the lines; the last is left out if it is cut, and used if it is the last of the file and whole."""
    lines = text.split(b"\n")
    last = lines.pop()
    return [*lines, last] if is_end and last.endswith(b"}") else lines
