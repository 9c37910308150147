"""Upload of what was logged offline, by `wandb sync`; imports no wandb, so that `trainer sync` stays light.

Facts about `wandb sync` (0.31) that this relies on:

- A file that a killed process left empty (7 bytes: the header) ends the whole batch, with exit code 0.
- The marker `run-ID.wandb.synced` signals success; only with it does a second sync skip the segment.
- Segments of one id are uploaded in the order of their start and become one run.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trainer.core import processes
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Tracking

_EMPTY_BYTES = 7
_TIMEOUT_S = 3600
_OF_OTHER_RUNS = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_MODE", "WANDB_DIR")
"""Variables of the shell that configure a future run; a segment holds its own values."""


@dataclass(frozen=True)
class Upload:
    """Result of uploading a run's offline segments: one per launch, including the attempts that resumed it."""

    uploaded: int
    already: int
    failed: list[Path]
    output: str
    """The output of `wandb sync`."""


def upload(run: RunDirectory, timeout_s: float = _TIMEOUT_S) -> Upload:
    """Upload the offline segments of `run` that are not on the server yet, and wait until that has ended."""
    tracked = run.events_of(Tracking)
    segments = _segments(run, tracked)
    waiting = [path for path in segments if not _marker(path).exists()]
    if not waiting:
        return Upload(0, len(segments), [], "")
    # The working directory is the run directory, which has a folder `wandb`.
    command = processes.python_module("wandb", "sync", "--yes", *(str(path.parent) for path in waiting))
    # stdin is closed: it must not prompt for a key. It finds what to stage where the run staged it.
    servers = [event.base_url for event in tracked if event.base_url]
    variables = {
        "WANDB_DATA_DIR": str(run.wandb_dir),
        "WANDB_CACHE_DIR": str(run.wandb_dir),
        **({"WANDB_BASE_URL": servers[-1]} if servers else {}),
        **{name: value for name, value in os.environ.items() if name not in _OF_OTHER_RUNS},
        "PYTHONPATH": processes.absolute_path_list(os.environ.get("PYTHONPATH", "")),
        "PYTHONSAFEPATH": "1",
    }
    try:
        done = subprocess.run(
            command,
            cwd=run.path,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        output = done.stdout
    except subprocess.TimeoutExpired:
        output = f"wandb sync did not finish within {timeout_s:g} s"
    failed = [path for path in waiting if not _marker(path).exists()]
    return Upload(len(waiting) - len(failed), len(segments) - len(waiting), failed, output.strip())


def _segments(run: RunDirectory, tracked: list[Tracking]) -> list[Path]:
    """Return the run's offline files that hold rows, by their start.

    WANDB_DIR may place them outside the run directory.
    """
    segments = set(run.wandb_dir.glob("offline-run-*/run-*.wandb"))
    for event in tracked:
        if event.dir:
            segments |= set(Path(event.dir).glob(f"offline-run-*-{event.id}*/run-{event.id}.wandb"))
    return sorted((path for path in segments if _holds_rows(path)), key=lambda path: path.parent.name)


def _holds_rows(segment: Path) -> bool:
    return segment.stat().st_size > _EMPTY_BYTES


def _marker(segment: Path) -> Path:
    return segment.with_name(segment.name + ".synced")
