"""The checkpoints of one run: list them, find the newest intact one, prune the rest.

This module does not import torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.checkpoint import commit
from trainer.core.errors import UserError

BEFORE_END = "-before-end"
"""Suffix of a checkpoint if a final checkpoint of the same step exists.

It holds the state before `on_train_end` changed the weights (stochastic weight averaging). A resume uses it; `last` is
the final one.
"""
_NAME = re.compile(r"step-(\d{8,})(" + BEFORE_END + ")?")
_STAGING = re.compile(re.escape(commit.STAGING) + r"(\d+)-.*")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint as described by its COMMIT."""

    path: Path
    step: int
    """Optimizer steps completed."""
    epoch: int
    time: float
    """Seconds since 1970 at the commit. For display only: checkpoints are ordered by step."""
    bytes: int
    """Size of all files."""
    metrics: dict[str, float | None]
    monitor: str | None
    monitor_value: float | None
    mode: Literal["min", "max"] | None
    """Whether lower or higher `monitor_value` is better; None if not stored."""
    world_size: int
    strategy: str
    layout: str

    @property
    def is_before_end(self) -> bool:
        """Whether it holds the state before `on_train_end`; see `BEFORE_END`."""
        return self.path.name.endswith(BEFORE_END)

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """Read the COMMIT of the folder `path`.

        Raises:
            OSError: There is no COMMIT.
            ValueError: COMMIT is damaged.
            UserError: The format is newer than this version of trainer reads.
        """
        content = commit.read_commit(path)
        return Checkpoint(
            path=path,
            step=content.step,
            epoch=content.epoch,
            time=content.time,
            bytes=sum(file.bytes for file in content.files.values()),
            metrics=content.metrics,
            monitor=content.monitor,
            monitor_value=content.monitor_value,
            mode=content.monitor_mode,
            world_size=content.world_size,
            strategy=content.strategy,
            layout=content.layout,
        )


class CheckpointStore:
    """The folder `checkpoints/` of a run. It considers only `step-NNNNNNNN` folders with a valid COMMIT."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of this step, whether or not it exists."""
        return self.directory / f"step-{step:08d}"

    def owns(self, path: Path) -> bool:
        """Return whether `path` is the folder of a checkpoint of this store, for any step."""
        return path.parent == self.directory and _NAME.fullmatch(path.name) is not None

    def committed(self) -> list[Checkpoint]:
        """Return the committed checkpoints by step, oldest first; the final one of a step comes last.

        File sizes are compared, checksums are not. Checkpoints of a newer format are left out.
        """
        checkpoints = []
        for path in self._folders():
            try:
                if not commit.verify(path, checksums=False):
                    checkpoints.append(Checkpoint.read(path))
            except (OSError, ValueError, UserError):
                continue  # deleted in the meantime, or of a newer format
        return sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, not checkpoint.is_before_end))

    def newest_good(self, set_aside: bool = False) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint whose checksums match, and a message for each that was skipped.

        Args:
            set_aside: Rename the skipped ones to `bad-...`, so that the same step can be saved again and `prune` does
                not count them. Only the process that writes the run's checkpoints may do so.

        Returns:
            `(None, [])` if there was never a checkpoint. `(None, messages)` if all are damaged: do not start from
            step 0 then.

        Raises:
            UserError: The newest has a newer format.
        """
        skipped: list[str] = []
        for path in sorted(self._folders(), key=lambda path: (step_of(path), len(path.name)), reverse=True):
            problems = commit.verify(path)
            if not problems:
                return Checkpoint.read(path), skipped
            skipped.append(f"{path.name} is damaged ({'; '.join(problems)})")
            if set_aside:
                self._set_aside(path)
        return None, skipped

    def prune(
        self,
        keep_last: int,
        keep_best: int = 0,
        mode: str | None = None,
        keep_every_n_steps: int | None = None,
    ) -> list[Checkpoint]:
        """Delete the checkpoints that no rule keeps. The newest is always kept.

        Only committed checkpoints count, so that none is deleted before its successor is complete.

        Args:
            keep_last: Number of newest steps to keep.
            keep_best: Number of best checkpoints to keep, in the order of `ranked`.
            mode: min or max, for checkpoints that do not record it.
            keep_every_n_steps: Keep all checkpoints whose step is a multiple of this.

        Returns:
            The deleted checkpoints.
        """
        checkpoints = self.committed()
        steps = sorted({checkpoint.step for checkpoint in checkpoints})
        keep = set(steps[-max(1, keep_last) :])
        keep.update(checkpoint.step for checkpoint in ranked(checkpoints, mode=mode or "min")[:keep_best])
        if keep_every_n_steps:
            keep.update(checkpoint.step for checkpoint in checkpoints if checkpoint.step % keep_every_n_steps == 0)
        doomed = [checkpoint for checkpoint in checkpoints if checkpoint.step not in keep]
        for checkpoint in doomed:
            commit.remove(checkpoint.path)
        return doomed

    def set_before_end(self, step: int) -> None:
        """Rename the checkpoint of this step with the suffix `BEFORE_END`, to make room for the final one.

        Does nothing if there is none. Only the process that writes the run's checkpoints may call this, with no save in
        flight.
        """
        path = self.path(step)
        if not path.is_dir():
            return
        renamed = path.parent / f"{path.name}{BEFORE_END}"
        if renamed.exists():
            commit.remove(renamed)
        os.rename(path, renamed)
        commit.sync(self.directory)

    def clean_leftovers(self, attempt: int) -> None:
        """Delete staging folders of earlier attempts and of failed saves of this one. Not while a save is in flight.

        An orphan of an earlier attempt that is still writing loses its staging folder, so it cannot commit.
        """
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            match = _STAGING.fullmatch(path.name)
            if path.name.startswith(commit.DELETING) or (match and int(match[1]) <= attempt):
                shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Return every folder that is named like a checkpoint; stray files and other names are ignored."""
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]

    def _set_aside(self, path: Path) -> None:
        bad = path.parent / f"{commit.BAD}{path.name}"
        shutil.rmtree(bad, ignore_errors=True)
        os.rename(path, bad)


def ranked(checkpoints: Sequence[Checkpoint], monitor: str | None = None, mode: str = "min") -> list[Checkpoint]:
    """Return the checkpoints that have a value of the monitored metric, best first; ties: the older first.

    Args:
        checkpoints: The checkpoints of one run.
        monitor: Name of the metric; None: that of the newest checkpoint with a value.
        mode: min or max, for checkpoints that do not record it.
    """
    measured = [checkpoint for checkpoint in checkpoints if checkpoint.monitor_value is not None]
    if not measured:
        return []
    newest = max(measured, key=lambda checkpoint: checkpoint.step)
    monitor = monitor or newest.monitor
    sign = -1.0 if (newest.mode or mode) == "max" else 1.0
    comparable = [checkpoint for checkpoint in measured if checkpoint.monitor == monitor]
    return sorted(comparable, key=lambda checkpoint: (sign * (checkpoint.monitor_value or 0.0), checkpoint.step))


def best_of(checkpoints: Sequence[Checkpoint], monitor: str | None = None, mode: str = "min") -> Checkpoint | None:
    """Return the best checkpoint, as `ranked` does; None if no checkpoint has a value of the metric."""
    return next(iter(ranked(checkpoints, monitor, mode)), None)


def is_named_as_checkpoint(path: Path) -> bool:
    """Return whether the folder is named like a checkpoint, complete or not."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
