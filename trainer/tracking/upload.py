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

from trainer.core import processes, records
from trainer.core.records import BadRecord
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Tracking

_EMPTY_BYTES = 7
_TIMEOUT_S = 3600
_ANSWER_S = 120.0
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


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What W&B's server has of a run, as `trainer.tracking.accepted` prints it."""

    rows: int
    """Rows that the uploaded segments hold."""
    served: int
    """Rows that the server has."""
    url: str


def upload(run: RunDirectory, timeout_s: float = _TIMEOUT_S, leave_out: Path | None = None) -> Upload:
    """Upload the offline segments of `run` that are not on the server yet, and wait until that has ended.

    Args:
        run: The run.
        timeout_s: Seconds after which it is given up.
        leave_out: A segment that is still written.
    """
    segments = [path for path in segments_of(run) if path != leave_out]
    waiting = [path for path in segments if not is_uploaded(path)]
    if not waiting:
        return Upload(0, len(segments), [], "")
    # The working directory is the run directory, which has a folder `wandb`.
    command = processes.python_module("wandb", "sync", "--yes", *(str(path.parent) for path in waiting))
    try:
        done = subprocess.run(
            command,
            cwd=run.path,
            env=environment(run),
            stdin=subprocess.DEVNULL,  # it must not prompt for a key
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        output = done.stdout
    except subprocess.TimeoutExpired:
        output = f"wandb sync did not finish within {timeout_s:g} s"
    failed = [path for path in waiting if not is_uploaded(path)]
    return Upload(len(waiting) - len(failed), len(segments) - len(waiting), failed, output.strip())


def environment(run: RunDirectory) -> dict[str, str]:
    """Return the environment of W&B's client for the segments of `run`: its server, and where it staged artifacts."""
    servers = [event.base_url for event in run.events_of(Tracking) if event.base_url]
    return {
        "WANDB_DATA_DIR": str(run.wandb_dir),
        "WANDB_CACHE_DIR": str(run.wandb_dir),
        **({"WANDB_BASE_URL": servers[-1]} if servers else {}),
        **{name: value for name, value in os.environ.items() if name not in _OF_OTHER_RUNS},
        "PYTHONPATH": processes.absolute_path_list(os.environ.get("PYTHONPATH", "")),
        "PYTHONSAFEPATH": "1",
    }


def segments_of(run: RunDirectory) -> list[Path]:
    """Return the run's offline files that hold rows, by their start.

    WANDB_DIR may place them outside the run directory.
    """
    segments = set(run.wandb_dir.glob("offline-run-*/run-*.wandb"))
    for event in run.events_of(Tracking):
        if event.dir:
            segments |= set(Path(event.dir).glob(f"offline-run-*-{event.id}*/run-{event.id}.wandb"))
    return sorted((path for path in segments if _holds_rows(path)), key=lambda path: path.parent.name)


def _holds_rows(segment: Path) -> bool:
    return segment.stat().st_size > _EMPTY_BYTES


def is_uploaded(segment: Path) -> bool:
    """Return whether W&B's client has uploaded the whole segment."""
    return _marker(segment).exists()


def mark_uploaded(segment: Path) -> None:
    """Mark a segment as W&B's client does once it has uploaded it."""
    _marker(segment).touch(mode=0o600)


def _marker(segment: Path) -> Path:
    return segment.with_name(segment.name + ".synced")


def accepted(run: RunDirectory, *segments: Path) -> Accepted | None:
    """Return what the server has of the run; None: it did not answer.

    Args:
        run: The run.
        segments: Segments to count as uploaded, too.
    """
    try:
        done = subprocess.run(
            processes.python_module("trainer.tracking.accepted", str(run.path), *map(str, segments)),
            env=environment(run),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_ANSWER_S,
        )
        return records.loads(Accepted, next(reversed(done.stdout.splitlines()), ""), "the answer about the W&B run")
    except (subprocess.TimeoutExpired, BadRecord):
        return None
