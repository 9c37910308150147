"""Rewind the files of CSV and TensorBoard loggers to a checkpoint, so that a resumed run stays one curve.

What each file held is recorded when a checkpoint is taken, and the rest is removed when a later attempt resumes from
it. Steps could not decide that: a module may log with a step of its own, such as the epoch or the tokens seen, and what
it adds by `logger.experiment` (images, text, histograms) need not have a step at all.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.events import LoggerPositions
from trainer.tracking.trackio_logger import TrackioLogger

_EVENT_FILES = "events.out.tfevents.*"


def record_positions(run: RunDirectory, loggers: Iterable[Logger], step: int) -> None:
    """Record what the files of the loggers hold at `step`, once the loggers have saved. Called on the first rank."""
    for logger in loggers:
        if isinstance(logger, TrackioLogger):
            logger.flush()
    positions = {_key(run, logger): position for logger in loggers if (position := _position(logger)) is not None}
    if positions:
        run.add_event(LoggerPositions(step=step, positions=positions))


def _folder(logger: Logger) -> Path:
    return Path(str(logger.log_dir))


def is_in_run(run: RunDirectory, logger: Logger) -> bool:
    """Return whether the logger writes into the run directory, so that no other run does."""
    return _folder(logger).absolute().is_relative_to(run.path.absolute())


def _key(run: RunDirectory, logger: Logger) -> str:
    folder = _folder(logger).absolute()
    return str(folder.relative_to(run.path.absolute()) if is_in_run(run, logger) else folder)


def _position(logger: Logger) -> dict[str, int] | None:
    """Return the size of each file: bytes of TensorBoard's, rows of a CSV file, whose header may be rewritten."""
    if isinstance(logger, CSVLogger):
        path = _folder(logger) / "metrics.csv"
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        return {path.name: max(0, lines - 1)}  # without the header
    if isinstance(logger, TensorBoardLogger):
        return {str(path.relative_to(_folder(logger))): path.stat().st_size for path in _event_files(_folder(logger))}
    return None


def position_at(run: RunDirectory, logger: Logger, step: int) -> Mapping[str, int] | None:
    """Return the recorded sizes of the logger's files at the checkpoint of `step`; None if there is no record."""
    if step == 0:
        return {}
    for event in reversed(run.events_of(LoggerPositions)):
        if event.step == step and _key(run, logger) in event.positions:
            return event.positions[_key(run, logger)]
    return None


def rewind_tensorboard(logger: TensorBoardLogger, position: Mapping[str, int] | None) -> None:
    """Cut the logger's event files to their recorded sizes, and delete newer ones. Without a record, keep them.

    Its SummaryWriter also writes `purge_step`, by which a TensorBoard that is open meanwhile forgets the later steps.
    """
    if position is None:
        return
    for path in _event_files(_folder(logger)):
        size = position.get(str(path.relative_to(_folder(logger))))
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


def _event_files(folder: Path) -> list[Path]:
    """Return the event files of a logger; `add_scalars` and `add_hparams` write into folders of their own below it."""
    return sorted(path for path in folder.rglob(_EVENT_FILES) if path.is_file() and not path.is_symlink())


def rewind_csv(logger: CSVLogger, position: Mapping[str, int] | None, step: int) -> None:
    """Keep the recorded rows, and let the logger append to them: Lightning deletes the file of a version that exists.

    Args:
        logger: The logger, whose experiment does not exist yet.
        position: The recorded number of rows; None: keep the rows up to `step`.
        step: The step of the checkpoint.
    """
    path = _folder(logger) / "metrics.csv"
    aside = path.with_name(".metrics.csv.before")
    if path.exists():
        path.replace(aside)  # a process that is killed here loses nothing
    names, rows = _names(aside), _rows(aside)
    if position is not None:
        rows = rows[: position.get(path.name, 0)]
    else:
        rows = [row for row in rows if float(row.get("step") or 0) <= step]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns that it deletes the file
        writer = logger.experiment
    if rows:
        _write(path, names, rows)
        writer.metrics_keys = names
    aside.unlink(missing_ok=True)


def _write(path: Path, names: list[str], rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; a last row that a crash has cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows[:-1] if rows and None in rows[-1].values() else rows


def _names(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])
