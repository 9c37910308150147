"""Uploading what was logged offline, by `wandb sync`; imports no wandb, so that `trainer sync` stays light.

Facts about `wandb sync` (0.31) that this stands on:
- A file that a killed process left empty (7 bytes: the header) ends the whole batch, with exit code 0.
- Success is told by the marker `run-ID.wandb.synced`; only with it does a second sync leave the segment out.
- Segments of one id go up in the order of their start and become one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.runs.directory import RunDirectory

_EMPTY_BYTES = 7
_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Upload:
    """What became of a run's offline segments: one a launch, attempts that resumed it included."""

    uploaded: int
    already: int
    failed: list[Path]
    said: str
    """The last lines of `wandb sync`."""


def upload(run: RunDirectory) -> Upload:
    """Upload the offline segments of `run` that are not on the server yet; waits until that has ended."""
    segments = sorted(path for path in run.wandb_dir.glob("offline-run-*/run-*.wandb") if _holds_rows(path))
    waiting = [path for path in segments if not _marker(path).exists()]
    if not waiting:
        return Upload(0, len(segments), [], "")
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(path.parent) for path in waiting)]
    # It must not be asked for a key on a terminal, and finds what to stage where the run staged it.
    variables = {"WANDB_DATA_DIR": str(run.wandb_dir), "WANDB_CACHE_DIR": str(run.wandb_dir), **os.environ}
    try:
        done = subprocess.run(
            command,
            cwd=run.path,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
        )
        said = done.stdout
    except subprocess.TimeoutExpired:
        said = f"wandb sync had not ended after {_TIMEOUT_S} s"
    failed = [path for path in waiting if not _marker(path).exists()]
    return Upload(len(waiting) - len(failed), len(segments) - len(waiting), failed, said.strip())


def _holds_rows(segment: Path) -> bool:
    return segment.stat().st_size > _EMPTY_BYTES


def _marker(segment: Path) -> Path:
    return segment.with_name(segment.name + ".synced")
