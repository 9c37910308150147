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
from typing import Any

from trainer.runs.directory import RunDirectory

_EMPTY_BYTES = 7
_TIMEOUT_S = 3600
_OF_OTHER_RUNS = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_MODE", "WANDB_DIR")
"""Variables of the shell that are about a run that is to come; a segment says for itself what it is."""


@dataclass(frozen=True)
class Upload:
    """What became of a run's offline segments: one a launch, attempts that resumed it included."""

    uploaded: int
    already: int
    failed: list[Path]
    output: str
    """The last lines of `wandb sync`."""


def upload(run: RunDirectory) -> Upload:
    """Upload the offline segments of `run` that are not on the server yet; waits until that has ended."""
    tracked = [event for event in run.events() if event["event"] == "tracking"]
    segments = _segments(run, tracked)
    waiting = [path for path in segments if not _marker(path).exists()]
    if not waiting:
        return Upload(0, len(segments), [], "")
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(path.parent) for path in waiting)]
    # It must not be asked for a key on a terminal, and finds what to stage where the run staged it.
    servers = [event["base_url"] for event in tracked if event.get("base_url")]
    variables = {
        "WANDB_DATA_DIR": str(run.wandb_dir),
        "WANDB_CACHE_DIR": str(run.wandb_dir),
        **({"WANDB_BASE_URL": servers[-1]} if servers else {}),
        **{name: value for name, value in os.environ.items() if name not in _OF_OTHER_RUNS},
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
            timeout=_TIMEOUT_S,
        )
        said = done.stdout
    except subprocess.TimeoutExpired:
        said = f"wandb sync had not ended after {_TIMEOUT_S} s"
    failed = [path for path in waiting if not _marker(path).exists()]
    return Upload(len(waiting) - len(failed), len(segments) - len(waiting), failed, said.strip())


def _segments(run: RunDirectory, tracked: list[dict[str, Any]]) -> list[Path]:
    """The run's offline files that hold rows, by their start; WANDB_DIR may have put them outside the run directory."""
    found = set(run.wandb_dir.glob("offline-run-*/run-*.wandb"))
    for event in tracked:
        if event.get("dir"):
            found |= set(Path(event["dir"]).glob(f"offline-run-*-{event['id']}*/run-{event['id']}.wandb"))
    return sorted((path for path in found if _holds_rows(path)), key=lambda path: path.parent.name)


def _holds_rows(segment: Path) -> bool:
    return segment.stat().st_size > _EMPTY_BYTES


def _marker(segment: Path) -> Path:
    return segment.with_name(segment.name + ".synced")
