"""One monotone curve in W&B over all attempts: a row that was sent is not sent again, and none is missing.

W&B appends rows and numbers them (`_step`), so what a resumed attempt repeats would be there twice. Resume is exact:
the rows that it repeats are the same, and are left out until training is past the last row that W&B has. Where the
server can rewind a run, its rows after the checkpoint are deleted instead, and logged again.

`wandb/rows.jsonl` has a line per row: which attempt sent it, its number and its optimizer step. What arrived follows
from it: online from the number at which the server continues, offline from the last row in the file of the segment,
because a killed client loses what it has not written yet. Missing steps are read from `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.core.files import parse_json, read_bytes
from trainer.core.records import BadRecord, dumps, from_json
from trainer.tracking.wandb_segment import last_row

AXIS = "trainer/global_step"
"""The x axis of every row, as in Lightning's WandbLogger."""
_MOST_BYTES = 4 * 1024**3


class Row(NamedTuple):
    """A row of W&B's history."""

    number: int
    """W&B's `_step`. Offline it counts from 0 in each segment."""
    step: int
    """Optimizer steps completed when it was logged."""
    has_metrics: bool
    """Whether a logger sent it, as a part of a line of `metrics.jsonl`, and not the user's own call."""
    names: tuple[str, ...] = ()
    """Its metrics, if a logger sent it; empty if an older release did."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line of an attempt in `wandb/rows.jsonl`."""

    mode: str
    file: str
    """W&B's transaction log."""
    first: int
    """The number of the attempt's first row. Online, earlier rows with this number or a larger one never arrived, or
    were deleted when the run was rewound."""


@dataclass(frozen=True)
class Segment:
    """The rows of one attempt."""

    header: Header
    rows: list[Row]

    @property
    def is_online(self) -> bool:
        """Whether the server numbers the rows."""
        return self.header.mode == "online"

    def arrived(self, next_number: int | None) -> list[Row]:
        """Return the rows that W&B has, or will have when the segment is uploaded.

        Args:
            next_number: The number of the next row on the server; None: unknown, all are counted.
        """
        if self.is_online:
            return self.rows if next_number is None else self.before(next_number)
        last = last_row(Path(self.header.file))
        return self.rows if last is None else [row for row in self.rows if row.number <= last]

    def before(self, number: int) -> list[Row]:
        """Return the rows before a number of the server's; offline rows have other numbers."""
        return self.rows if not self.is_online else [row for row in self.rows if row.number < number]


@dataclass(frozen=True)
class Sent:
    """What earlier attempts have sent."""

    segments: list[Segment]

    @classmethod
    def read(cls, path: Path) -> Sent:
        """Read `wandb/rows.jsonl`; a line that a crash cut short is left out."""
        segments: list[Segment] = []
        try:
            text = read_bytes(path, _MOST_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return cls([])
        for line in text.splitlines():
            try:
                content = parse_json(line)
                if isinstance(content, dict):
                    header = from_json(Header, content, path)
                    if header.mode == "online":
                        segments = [replace(one, rows=one.before(header.first)) for one in segments]
                    segments.append(Segment(header, []))
                elif segments:
                    number, step, has_metrics, *names = content
                    segments[-1].rows.append(Row(int(number), int(step), bool(has_metrics), tuple(map(str, names))))
            except (ValueError, TypeError, BadRecord):
                continue
        return cls(segments)

    def rewind_target(self, step: int) -> int | None:
        """Return the number of the last row up to `step` in a run that was only logged online; None: there is none."""
        if not all(segment.is_online for segment in self.segments):
            return None
        return max((row.number for one in self.segments for row in one.rows if row.step <= step), default=None)

    def after(self, step: int) -> bool:
        """Return whether rows after `step` were sent."""
        return any(row.step > step for segment in self.segments for row in segment.rows)


def _line(row: Row) -> str:
    return json.dumps([row.number, row.step, int(row.has_metrics), *row.names])


def _names_there(there: Sequence[Row], step: int) -> set[str]:
    """Return the metrics of a step that W&B has: a line of `metrics.jsonl` may be several rows, as after a validation.

    Empty if that is not known, because an older release sent one of them.
    """
    rows = [row.names for row in there if row.has_metrics and row.step == step]
    return {name for names in rows for name in names} if all(rows) else set()


def _number(value: Any) -> Any:
    """Return the number for which `metrics.jsonl` has a name, because JSON does not have it."""
    return float(value) if value in ("nan", "inf", "-inf") else value


class OneCurve:
    """Replaces `log` of wandb's Run: adds the step to each row, records it, and leaves out what W&B has.

    Args:
        experiment: wandb's Run.
        path: `wandb/rows.jsonl`.
        mode: The mode of this attempt.
        completed_steps: Returns the completed optimizer steps.
    """

    def __init__(self, experiment: Any, path: Path, mode: str, completed_steps: Callable[[], int]) -> None:
        self._log = experiment.log
        self._completed_steps = completed_steps
        self._is_online = mode == "online"
        self._number = int(experiment.starting_step)
        self._first = self._number
        self._there: Counter[int] = Counter()
        """Optimizer step to the number of its rows that W&B has and this attempt will repeat."""
        self._unknown, self._last_known = 0, 0
        """Number of rows that W&B has and no line of the file tells of: they come after the last known step."""
        folder = Path(experiment.settings.sync_dir)
        header = Header(mode=mode, file=str(folder / f"run-{experiment.id}.wandb"), first=self._first)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._file, b"\n" + dumps(header).encode() + b"\n")  # the last line may have been cut short

    def continue_from(
        self,
        sent: Sent,
        step: int,
        lines: Callable[[int], Sequence[Mapping[str, Any]]],
        *,
        ended_well: bool = False,
        only_sent: bool = False,
    ) -> None:
        """Log what is missing up to `step`, and leave out later what is there already.

        Args:
            sent: What earlier attempts have sent.
            step: The step from which this attempt resumes.
            lines: Returns the lines of `metrics.jsonl` after a step.
            ended_well: Whether the last attempt has ended by itself. Then it repeats nothing, and rows that the file
                does not know of are somebody else's.
            only_sent: Log only steps that an attempt had meant for W&B: another one was told not to log to it.
        """
        next_number = self._first if self._is_online else None
        there: list[Row] = []
        end = 0
        for segment in sent.segments:
            rows = segment.arrived(next_number)
            there += rows
            after = max((row.number + 1 for row in rows), default=0)
            end = max(end, after) if segment.is_online else end + after
        self._there.update(row.step for row in there if row.step > step)
        self._unknown = 0 if ended_well else max(0, self._first - end)
        self._last_known = max((row.step for row in there), default=0)
        last_line = max((row.step for row in there if row.has_metrics), default=-1)
        names_there = _names_there(there, last_line)
        meant = max((row.step for one in sent.segments for row in one.rows), default=-1)
        for line in lines(last_line - 1 if names_there else last_line):
            if only_sent and line["step"] > meant:
                continue
            known = {"step", "time"} | (names_there if line["step"] == last_line else set())
            values = {name: _number(value) for name, value in line.items() if name not in known}
            if values:
                self._send({**values, AXIS: line["step"]}, Row(self._number, line["step"], True, tuple(values)))

    def log(self, data: Any, step: int | None = None, commit: bool | None = None, **more: Any) -> None:
        """Log a row as wandb's Run does."""
        now = self._completed_steps()
        is_row = commit if commit is not None else step is None
        if step is not None:  # the user numbers the rows: W&B itself leaves out smaller numbers
            self._log(data, step=step, commit=commit, **more)
            self._number = max(self._number, step)
            self._record(Row(self._number, now, False))
            self._number += bool(commit)
        elif self._is_there(now, is_row):
            return
        elif is_row and isinstance(data, Mapping):
            names = tuple(name for name in data if name != AXIS) if AXIS in data else ()
            self._send({AXIS: now, **data}, Row(self._number, now, AXIS in data, names), commit, **more)
        else:
            self._log(data, commit=commit, **more)

    def _is_there(self, step: int, is_row: bool) -> bool:
        if self._there.get(step, 0) > 0:
            self._there[step] -= is_row
            return True
        if self._unknown > 0 and step > self._last_known:
            self._unknown -= is_row
            return True
        return False

    def _send(self, data: dict[str, Any], row: Row, commit: bool | None = None, **more: Any) -> None:
        self._log(data, commit=commit, **more)
        self._record(row)
        self._number += 1

    def _record(self, row: Row) -> None:
        with contextlib.suppress(OSError):  # a full disk: no reason to end the training
            os.write(self._file, _line(row).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
