"""The checkpoints of one run: list them, find the newest intact one, prune the rest.

What a checkpoint holds: `train/checkpoint_contents.py`. This module does not import torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.checkpoint import commit
from trainer.checkpoint.wellformed import BadCheckpoint
from trainer.core.errors import UserError
from trainer.core.files import sync

BEFORE_END = "-before-end"
"""Suffix of a checkpoint if a final checkpoint of the same step exists.

It holds the state before `on_train_end` changed the weights (stochastic weight averaging). A resume uses it; `last` is
the final one.
"""
_NAME = re.compile(r"step-([0-9]{8,18})(" + BEFORE_END + ")?")
_LEFTOVER = re.compile(
    rf"(?:{re.escape(commit.DELETING)}|{re.escape(commit.STAGING)}([0-9]+)-){_NAME.pattern}(?:\.([a-z0-9]+))?"
)
"""Name of a staged or half deleted checkpoint; the groups: attempt, step, suffix, id of the run."""
Verify = Callable[[Path], list[str]]
"""Returns the problems of a checkpoint folder; an empty list if it is intact."""


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
    run: str | None = None
    """Id of the run that wrote it; None if not stored."""
    save_id: str | None = None
    """Of a part of a checkpoint, on the disk of one node."""

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
        return Checkpoint.of(path, commit.read_commit(path))

    @staticmethod
    def of(path: Path, content: commit.Commit) -> Checkpoint:
        """Return the checkpoint that a COMMIT describes."""
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
            run=content.run,
            save_id=content.save_id,
        )


class CheckpointStore:
    """The folder `checkpoints/` of a run. It considers only `step-NNNNNNNN` folders with a valid COMMIT.

    Args:
        directory: The folder. A symbolic link is refused: retention would delete in another place.
        run: Id of the run. Nothing is deleted that carries another id. None: of any run.
        strict: Use and delete only what carries the id; otherwise also what carries none, as older releases wrote it.
    """

    def __init__(self, directory: Path, run: str | None = None, strict: bool = False) -> None:
        self.directory = Path(directory)
        self.run, self.strict = run, strict

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
                if not _problems(path, _sizes):
                    checkpoints.append(Checkpoint.read(path))
            except (OSError, ValueError, UserError):
                continue  # deleted in the meantime, or of a newer format
        return in_order(checkpoints)

    def newest_good(
        self, set_aside: bool = False, verify: Verify = commit.verify
    ) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint whose checksums match, and a message for each that was skipped.

        Args:
            set_aside: Rename the skipped ones to `bad-...`, so that the same step can be saved again and `prune` does
                not count them. Only the process that writes the run's checkpoints may do so.
            verify: Returns the problems of a checkpoint folder, as `commit.verify`.

        Returns:
            `(None, [])` if there was never a checkpoint. `(None, messages)` if all are damaged: do not start from
            step 0 then.

        Raises:
            UserError: The newest has a newer format.
            BadCheckpoint: The folder of the checkpoints is a symbolic link.
        """
        self.require_real()
        skipped: list[str] = []
        for path in sorted(self._folders(), key=lambda path: (step_of(path), len(path.name)), reverse=True):
            if self.strict and not self._is_own(_read(path)):
                skipped.append(f"{path.name} is not of this run")
                continue
            problems = _problems(path, verify)
            if not problems:
                return Checkpoint.read(path), skipped
            skipped.append(f"{path.name} is damaged ({'; '.join(problems)})")
            if set_aside:
                commit.set_aside(path)
        return None, skipped

    def prune(
        self,
        keep_last: int,
        keep_best: int = 0,
        mode: str | None = None,
        keep_every_n_steps: int | None = None,
        busy: Collection[str] = (),
    ) -> list[Checkpoint]:
        """Delete the checkpoints that no rule keeps. The newest is always kept.

        Only committed checkpoints count, so that none is deleted before its successor is complete. Those of another run
        count and stay.

        Args:
            keep_last: Number of newest steps to keep.
            keep_best: Number of best checkpoints to keep, in the order of `ranked`.
            mode: min or max, for checkpoints that do not record it.
            keep_every_n_steps: Keep all checkpoints whose step is a multiple of this.
            busy: Names of folders that are still read, for an upload.

        Returns:
            The deleted checkpoints.
        """
        self.require_real()
        checkpoints = self.committed()
        keep = kept(checkpoints, keep_last, keep_best, mode, keep_every_n_steps)
        doomed = [
            checkpoint
            for checkpoint in checkpoints
            if checkpoint.step not in keep and checkpoint.path.name not in busy and self._is_own(checkpoint)
        ]
        for checkpoint in doomed:
            commit.remove(checkpoint.path, self.run)
        return doomed

    def set_before_end(self, step: int) -> Path | None:
        """Rename the checkpoint of this step with the suffix `BEFORE_END`, to make room for the final one.

        Returns its path; None if there is none. Only the process that writes the run's checkpoints may call this, with
        no save in flight.
        """
        path = self.path(step)
        if not path.is_dir():
            return None
        renamed = path.parent / f"{path.name}{BEFORE_END}"
        if os.path.lexists(renamed):
            if not renamed.is_symlink() and self._is_own(_read(renamed)):
                commit.remove(renamed, self.run)
            else:
                commit.set_aside(renamed)
        os.rename(path, renamed)
        sync(self.directory)
        return renamed

    def remove_newer(self, step: int) -> None:
        """Delete the checkpoints of this run at later steps."""
        self.require_real()
        for path in self._folders():
            if step_of(path) > step and not path.is_symlink() and self._is_own(_read(path)):
                commit.remove(path, self.run)

    def clean_leftovers(self, attempt: int) -> None:
        """Delete staging folders of earlier attempts and of failed saves of this one. Not while a save is in flight.

        An orphan of an earlier attempt that is still writing loses its staging folder, so it cannot commit.
        """
        self.require_real()
        for path, attempt_of in self._leftovers():
            if attempt_of is None or attempt_of <= attempt:
                shutil.rmtree(path, ignore_errors=True)

    def remove_own(self) -> None:
        """Delete every checkpoint of this run, complete or not, and then the folder if nothing else is in it."""
        if self.directory.is_symlink() or not self.directory.is_dir():
            return
        for path, _ in self._leftovers():
            shutil.rmtree(path, ignore_errors=True)
        for path in [path for path in self.directory.iterdir() if _is_named(path) and not path.is_symlink()]:
            if self._is_own(_read(path)):
                commit.remove(path, self.run)
        try:
            self.directory.rmdir()
        except OSError:  # something else is in it
            pass

    def require_real(self) -> None:
        """Check that the folder is not a symbolic link.

        Raises:
            BadCheckpoint: It is one.
        """
        if self.directory.is_symlink():
            raise BadCheckpoint(
                f"{self.directory} is a symbolic link; checkpoints are deleted only in the run directory itself",
                "move the folder that it names to this place, or start the run with runs_dir on that file system",
            )

    def _leftovers(self) -> list[tuple[Path, int | None]]:
        """Return the staged checkpoints of this run with their attempts, and those that are half deleted with None."""
        if not self.directory.is_dir():
            return []
        matches = [(path, _LEFTOVER.fullmatch(path.name)) for path in self.directory.iterdir() if not path.is_symlink()]
        return [
            (path, int(match[1]) if match[1] else None)
            for path, match in matches
            if match and (self.run is None or match[4] == self.run or (match[4] is None and not self.strict))
        ]

    def _is_own(self, checkpoint: Checkpoint | None) -> bool:
        """Return whether the checkpoint is of this run. None: its COMMIT cannot be read."""
        if checkpoint is None:
            return False
        return self.run is None or checkpoint.run == self.run or (checkpoint.run is None and not self.strict)

    def _folders(self) -> list[Path]:
        """Return every folder that is named like a checkpoint; stray files and other names are ignored."""
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]


def _read(path: Path) -> Checkpoint | None:
    """Return what COMMIT states; None if it cannot be read."""
    try:
        return Checkpoint.read(path)
    except (OSError, ValueError, UserError):
        return None


def _is_named(path: Path) -> bool:
    """Return whether the folder is named like a checkpoint, or like one that was set aside."""
    name, _, number = path.name.removeprefix(commit.BAD).partition(".")
    return _NAME.fullmatch(name) is not None and (not number or number.isdigit())


def _sizes(path: Path) -> list[str]:
    return commit.verify(path, checksums=False)


def _problems(path: Path, verify: Verify) -> list[str]:
    """Return the problems of a checkpoint in a store: those of `verify`, and that another one has its name."""
    if path.is_symlink():
        return ["a symbolic link, not a folder"]
    problems = verify(path)
    if not problems and (step := commit.read_commit(path).step) != step_of(path):
        problems = [f"{commit.COMMIT}: it is of step {step}"]
    return problems


def in_order(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints by step, oldest first; the final one of a step comes last."""
    return sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, not checkpoint.is_before_end))


def kept(
    checkpoints: Sequence[Checkpoint],
    keep_last: int,
    keep_best: int = 0,
    mode: str | None = None,
    keep_every_n_steps: int | None = None,
) -> set[int]:
    """Return the steps that retention keeps; the arguments are those of `CheckpointStore.prune`."""
    keep = set(sorted({checkpoint.step for checkpoint in checkpoints})[-max(1, keep_last) :])
    keep.update(checkpoint.step for checkpoint in ranked(checkpoints, mode=mode or "min")[:keep_best])
    if keep_every_n_steps:
        keep.update(checkpoint.step for checkpoint in checkpoints if checkpoint.step % keep_every_n_steps == 0)
    return keep


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
