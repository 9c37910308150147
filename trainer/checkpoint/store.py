"""The checkpoints of one run: which are there, which is the newest good one, which may go. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint import commit
from trainer.core.errors import UserError

BEFORE_END = "-before-end"
"""After the name of a checkpoint beside the final one of its step: the state before `on_train_end` changed the weights
(stochastic weight averaging). A resume takes it; `last` is the final one."""
_NAME = re.compile(r"step-(\d{8,})(" + BEFORE_END + ")?")
_STAGING = re.compile(re.escape(commit.STAGING) + r"(\d+)-.*")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as its COMMIT describes it."""

    path: Path
    step: int
    """Optimizer steps completed."""
    epoch: int
    time: float
    """Seconds since 1970 at the commit. For people: the order of checkpoints is that of their steps."""
    bytes: int
    metrics: dict[str, float | None]
    monitor: str | None
    monitor_value: float | None
    mode: str | None
    """min or max: which values of `monitor` are better; None in a checkpoint from before it was stored."""
    world_size: int
    strategy: str
    layout: str

    @property
    def is_before_end(self) -> bool:
        """Whether it is the state before `on_train_end`, beside a final one; see `BEFORE_END`."""
        return self.path.name.endswith(BEFORE_END)

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """Raises OSError without a COMMIT, ValueError if it is damaged, UserError if its format is newer."""
        content = commit.read_commit(path)
        return Checkpoint(
            path=path,
            step=content["step"],
            epoch=content["epoch"],
            time=content["time"],
            bytes=sum(entry["bytes"] for entry in content["files"].values()),
            metrics=content["metrics"],
            monitor=content["monitor"],
            monitor_value=content["monitor_value"],
            mode=content.get("monitor_mode"),
            world_size=content["world_size"],
            strategy=content["strategy"],
            layout=content["layout"],
        )


class CheckpointStore:
    """The folder `checkpoints/` of a run. Only `step-NNNNNNNN` folders with a valid COMMIT exist for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step is, or will be."""
        return self.directory / f"step-{step:08d}"

    def owns(self, path: Path) -> bool:
        """Whether this is where `path` puts a checkpoint of some step."""
        return path.parent == self.directory and _NAME.fullmatch(path.name) is not None

    def committed(self) -> list[Checkpoint]:
        """By step, oldest first, of a step the final one last. Sizes are compared, checksums are not; one of a newer
        format is left out."""
        found = []
        for path in self._folders():
            try:
                if not commit.verify(path, checksums=False):
                    found.append(Checkpoint.read(path))
            except (OSError, ValueError, UserError):
                continue  # removed meanwhile, or not ours to count
        return sorted(found, key=lambda checkpoint: (checkpoint.step, not checkpoint.is_before_end))

    def newest_good(self, set_aside: bool = False) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint of the highest step whose checksums are right, and a message for each that was skipped.

        With `set_aside` the skipped ones are renamed to `bad-...`, so that a later save of the same step has
        room and none is counted by `prune`; only the writer of the run may ask for that.
        (None, []) means that there never was one; (None, messages) that all are bad: do not start from step 0 then.
        Raises UserError if the newest is of a newer format.
        """
        skipped: list[str] = []
        for path in sorted(self._folders(), key=lambda path: (step_of(path), len(path.name)), reverse=True):
            problems = commit.verify(path)
            if not problems:
                return Checkpoint.read(path), skipped
            skipped.append(f"{path.name} is not usable ({'; '.join(problems)})")
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
        """Delete what none of the rules keeps; returns what was deleted. The newest always stays.

        Only committed checkpoints count, so nothing goes before its successor is complete. `keep_best` ranks as
        `ranked` does; `mode` is for checkpoints that do not say it themselves.
        """
        found = self.committed()
        steps = sorted({checkpoint.step for checkpoint in found})
        keep = set(steps[-max(1, keep_last) :])
        keep.update(checkpoint.step for checkpoint in ranked(found, mode=mode or "min")[:keep_best])
        if keep_every_n_steps:
            keep.update(checkpoint.step for checkpoint in found if checkpoint.step % keep_every_n_steps == 0)
        doomed = [checkpoint for checkpoint in found if checkpoint.step not in keep]
        for checkpoint in doomed:
            commit.remove(checkpoint.path)
        return doomed

    def set_before_end(self, step: int) -> None:
        """Make room for the final checkpoint of this step: the one that is there becomes the one before the end.

        Nothing where there is none. Only the writer of the run may do so, with no save in flight.
        """
        path = self.path(step)
        if not path.is_dir():
            return
        aside = path.parent / f"{path.name}{BEFORE_END}"
        if aside.exists():
            commit.remove(aside)
        os.rename(path, aside)
        commit.sync(self.directory)

    def clean_leftovers(self, attempt: int) -> None:
        """Remove what dead attempts, and failed saves of this one, left behind. Not while a save is in flight.

        An orphan of an earlier attempt that is still writing loses its staging folder, and so cannot commit.
        """
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            staged = _STAGING.fullmatch(path.name)
            if path.name.startswith(commit.DELETING) or (staged and int(staged[1]) <= attempt):
                shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Every folder that is named like a checkpoint; stray files and other names are none of ours."""
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]

    def _set_aside(self, path: Path) -> None:
        bad = path.parent / f"{commit.BAD}{path.name}"
        shutil.rmtree(bad, ignore_errors=True)
        os.rename(path, bad)


def ranked(found: Sequence[Checkpoint], monitor: str | None = None, mode: str = "min") -> list[Checkpoint]:
    """Those with a value of the monitored metric, the best first; of equals the older.

    `monitor`: the metric; None: that of the newest which has a value. `mode` is for checkpoints without their own.
    """
    measured = [checkpoint for checkpoint in found if checkpoint.monitor_value is not None]
    if not measured:
        return []
    newest = max(measured, key=lambda checkpoint: checkpoint.step)
    monitor = monitor or newest.monitor
    sign = -1.0 if (newest.mode or mode) == "max" else 1.0
    alike = [checkpoint for checkpoint in measured if checkpoint.monitor == monitor]
    return sorted(alike, key=lambda checkpoint: (sign * (checkpoint.monitor_value or 0.0), checkpoint.step))


def best_of(found: Sequence[Checkpoint], monitor: str | None = None, mode: str = "min") -> Checkpoint | None:
    """The first of `ranked`; None where no checkpoint was validated."""
    return next(iter(ranked(found, monitor, mode)), None)


def is_named_as_checkpoint(path: Path) -> bool:
    """Whether a folder's name is one of a checkpoint, complete or not."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
