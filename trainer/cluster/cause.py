"""Why an attempt died, read from its log files: the rank that failed first, not those that it took along."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

_TAIL_BYTES = 256 * 1024
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""What torch.distributed puts before each line of an uncaught exception."""
_TRACEBACK = "Traceback (most recent call last):"
_DRAGGED_ALONG = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|connectFullMesh|DistNetworkError"
    r"|DistStoreError|NCCL|gloo|\bTCPStore\b|Timed out waiting",
    re.IGNORECASE,
)
"""What a rank says whose peer is gone. Such a rank is blamed only when no other has anything better to say."""
_TORCHRUN_FAILURE = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
"""torch/distributed/elastic/multiprocessing/api.py"""


@dataclass(frozen=True)
class Cause:
    """Why an attempt died."""

    reason: str
    """One line."""
    lines: list[str]
    """The last lines of the traceback, or of the log where there is none."""
    log: Path | None
    """Where the rest is."""
    exit_code: int | None
    """Of the rank that torchrun saw fail first; negative: the signal."""


def tail(path: Path, max_bytes: int = _TAIL_BYTES) -> list[str]:
    """The last lines of a file, torch's rank prefix removed; none when it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - max_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [_RANK_PREFIX.sub("", line) for line in text.splitlines()]


def last_traceback(lines: list[str]) -> list[str]:
    """From the last `Traceback` to the line of the exception; empty when there is none.

    Of an exception's message only the first line belongs to it for sure: what follows may be any output.
    """
    starts = [index for index, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    if not starts:
        return []
    for index in range(starts[-1] + 1, len(lines)):
        if lines[index] and not lines[index][0].isspace():
            return lines[starts[-1] : index + 1]
    return lines[starts[-1] :]


def find(attempt_dir: Path, node_log: Path | None = None) -> Cause:
    """The cause of death of the attempt whose logs are in `attempt_dir`; `node_log` has what torchrun said."""
    failed_rank, exit_code = _first_failure(tail(node_log) if node_log else [])
    candidates: list[tuple[int, float, Cause]] = []
    for log in sorted(attempt_dir.glob("rank-*.log"), key=_rank_of):
        traceback = last_traceback(tail(log))
        if not traceback:
            continue
        cause = Cause(traceback[-1], traceback, log, exit_code)
        candidates.append((1 if _DRAGGED_ALONG.search(traceback[-1]) else 0, log.stat().st_mtime, cause))
    candidates.sort(key=lambda candidate: candidate[:2])
    if candidates and candidates[0][0] == 0:
        return candidates[0][2]
    if exit_code is not None and exit_code != 1:
        log = attempt_dir / f"rank-{failed_rank}.log"
        return Cause(_describe(failed_rank, exit_code), tail(log)[-5:], log if log.exists() else None, exit_code)
    if candidates:
        return candidates[0][2]
    return _without_rank_logs(attempt_dir, node_log, exit_code)


def _without_rank_logs(attempt_dir: Path, node_log: Path | None, exit_code: int | None) -> Cause:
    for log in [*sorted(attempt_dir.glob("rank-*.log"), key=_rank_of), *([node_log] if node_log else [])]:
        lines = [line for line in tail(log) if line.strip()]
        traceback = last_traceback(lines)
        if traceback:
            return Cause(traceback[-1], traceback, log, exit_code)
        if lines:
            return Cause(f"its workers ended without saying why: {lines[-1]}", lines[-5:], log, exit_code)
    return Cause("its workers ended without saying why", [], None, exit_code)


def _rank_of(log: Path) -> int:
    return int("".join(re.findall(r"\d+", log.stem)) or 0)


def _first_failure(lines: list[str]) -> tuple[int, int | None]:
    """Local rank and exit code in torchrun's last report."""
    for line in reversed(lines):
        match = _TORCHRUN_FAILURE.search(line)
        if match:
            return int(match[2]), int(match[1])
    return 0, None


def _describe(rank: int, exit_code: int) -> str:
    if exit_code >= 0:
        return f"rank {rank} exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (often the kernel, out of memory)" if name == "SIGKILL" else ""
    return f"rank {rank} was killed by {name}{hint}"
