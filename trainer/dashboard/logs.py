"""Read the logs of a run in parts, for a page that follows their end."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from trainer.core.files import open_regular
from trainer.core.secrets import mask
from trainer.core.text import log_text
from trainer.runs.directory import RunDirectory

MOST_BYTES = 256 << 10
"""The largest part that is sent at once."""
_NAME = re.compile(r"attempt-([0-9]{1,6})/(rank|node)-([0-9]{1,6})|launch")


def log_names(run: RunDirectory) -> list[str]:
    """Return the names of the logs that exist, newest attempt first: `attempt-01/rank-0`."""
    names = []
    for attempt in reversed(run.logged_attempts()):
        folder = run.attempt_logs(attempt)
        found = {path.name.removesuffix(".log") for path in folder.glob("*.log")}
        names += [
            f"{folder.name}/{name}"
            for name in sorted(found, key=lambda name: (name.startswith("node"), len(name), name))
            if _NAME.fullmatch(f"{folder.name}/{name}")
        ]
    return names + (["launch"] if (run.logs_dir / "launch.log").exists() else [])


def log_path(run: RunDirectory, name: str) -> Path | None:
    """Return the file of a log; None if the name is not that of one."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if name == "launch":
        return run.logs_dir / "launch.log"
    attempt, kind, number = int(match[1]), match[2], int(match[3])
    return run.rank_log(attempt, number) if kind == "rank" else run.node_log(attempt, number)


def read_log(path: Path, offset: int | None, before: int | None = None) -> dict[str, Any]:
    """Return a part of a log as text that is safe to show, from the start of a line.

    Args:
        path: The log.
        offset: Where to begin; None: near the end.
        before: Read the part that ends here instead.

    Returns:
        `text`, the offsets `start` and `end` of it, and the `size` of the file.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        end = size if before is None else max(0, min(before, size))
        is_next = before is None and offset is not None and 0 <= offset <= size
        start = offset if is_next and offset is not None else max(0, end - MOST_BYTES)
        data = os.pread(file.fileno(), min(MOST_BYTES, end - start), start)
    is_cut = start > 0 and start != offset
    if is_cut and (newline := data.find(b"\n")) >= 0:
        start, data = start + newline + 1, data[newline + 1 :]
    if (last := data.rfind(b"\n")) >= 0 and offset is not None and before is None:
        data = data[: last + 1]  # the line that is being written is sent once it is whole
    return {
        "text": mask(log_text(data.decode(errors="replace"))),
        "start": start,
        "end": start + len(data),
        "size": size,
    }
