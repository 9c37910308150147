"""Why an attempt died, read from its log files: the rank that failed first, not those that it took along."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.runs.directory import RunDirectory
from trainer.runs.records import Failure

_TAIL_BYTES = 256 * 1024
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""What torch.distributed puts before each line of an uncaught exception."""
TRACEBACK = "Traceback (most recent call last):"
DRAGGED_ALONG = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|connectFullMesh|DistNetworkError"
    r"|DistStoreError|NCCL|gloo|\bTCPStore\b|Timed out waiting",
    re.IGNORECASE,
)
"""What a rank says whose peer is gone. Such a rank is blamed only when no other has anything better to say."""
_TORCHRUN_FAILURE = re.compile(
    r"(?:^E(\d{4} [\d:.]+) .*)?failed \(exitcode: (-?\d+)\) local_rank: (\d+)(?: \(pid: (\d+)\))?"
)
"""torch/distributed/elastic/multiprocessing/api.py"""
_TORCHRUN_SAYS = re.compile(r"[EWI]\d{4} [\d:.]+ ")
"""How a line of its log begins."""
_NODE_HOST = re.compile(r"^attempt \d+: .* on (\S+)$")
"""What trainer/supervise/supervisor.py writes first."""
_KILLED_TORCHRUN = re.compile(r"^torchrun on (\S+) was killed by ")
"""What it writes of a torchrun that did not end by itself."""


TRACEBACK_BEGINS, TRACEBACK_ENDS = "--- traceback of what ended this rank", "--- end of the traceback"
"""Lines of a rank's log; a terminal that follows the log leaves out what is between them."""
FAILURE_VARIABLE = "TRAINER_FAILURE"
"""In the environment of a command's ranks: the file for the message of the first that fails."""


def failures(run: RunDirectory, attempt: int) -> list[Failure]:
    """What the ranks of an attempt wrote down, those first that were not dragged along, then by time."""
    return sorted(
        run.failures(attempt), key=lambda one: (not one.is_final, bool(DRAGGED_ALONG.search(one.reason)), one.time)
    )


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
    rank: int | None = None
    host: str | None = None
    where: str | None = None
    """The user's own line that an exception came from."""
    mend: bool = False
    """Whether a resume must fail in the same way until something is changed."""


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


def is_traceback(cause: Cause) -> bool:
    """Whether the reason is an exception's."""
    return bool(cause.lines) and cause.lines[0].startswith(TRACEBACK)


def last_traceback(lines: list[str]) -> list[str]:
    """From the last `Traceback` to the line of the exception; empty when there is none.

    Of an exception's message only the first line belongs to it for sure: what follows may be any output.
    """
    starts = [index for index, line in enumerate(lines) if line.startswith(TRACEBACK)]
    if not starts:
        return []
    for index in range(starts[-1] + 1, len(lines)):
        if lines[index] and not lines[index][0].isspace():
            return lines[starts[-1] : index + 1]
    return lines[starts[-1] :]


@dataclass(frozen=True)
class _Failure:
    """The rank that torchrun saw fail first."""

    time: str
    rank: int
    host: str | None
    exit_code: int


def find(run: RunDirectory, attempt: int, node_log: Path | None = None) -> Cause:
    """The cause of death of an attempt, from its logs; `node_log` has what torchrun said, and so have those of the
    other nodes beside it."""
    found = _find(run, attempt, node_log)
    if found.rank is None and found.log is not None and found.log.name.startswith("rank-"):
        found = replace(found, rank=_rank_of(found.log))
    if found.rank is not None and found.host is None:
        beat = run.heartbeat(found.rank)
        found = replace(found, host=beat.host if beat else None)
    return found


def _find(run: RunDirectory, attempt: int, node_log: Path | None) -> Cause:
    failure = _first_failure(run, node_log)
    exit_code = failure.exit_code if failure else None
    told = failures(run, attempt)
    if told and not DRAGGED_ALONG.search(told[0].reason):
        log = run.rank_log(attempt, told[0].rank)
        return Cause(told[0].reason, [], log, exit_code, told[0].rank, None, told[0].where, told[0].mend)
    candidates: list[tuple[int, float, Cause]] = []
    for log in run.rank_logs(attempt).values():
        traceback = last_traceback(tail(log))
        if not traceback:
            continue
        cause = Cause(traceback[-1], traceback, log, exit_code)
        candidates.append((1 if DRAGGED_ALONG.search(traceback[-1]) else 0, log.stat().st_mtime, cause))
    candidates.sort(key=lambda candidate: candidate[:2])
    if candidates and candidates[0][0] == 0:
        return candidates[0][2]
    killed = _killed_torchrun(node_log)
    if killed:
        return killed
    if failure is not None and exit_code not in (None, 1):
        log = run.rank_log(attempt, failure.rank)
        reason = _describe(failure.rank, failure.exit_code)
        return Cause(reason, tail(log)[-5:], log if log.exists() else None, exit_code, failure.rank, failure.host)
    if candidates:
        return candidates[0][2]
    return _without_rank_logs(run, attempt, node_log, exit_code)


def _without_rank_logs(run: RunDirectory, attempt: int, node_log: Path | None, exit_code: int | None) -> Cause:
    for log in [*run.rank_logs(attempt).values(), *([node_log] if node_log else [])]:
        lines = [line for line in tail(log) if line.strip()]
        if log == node_log:
            lines = _before_torchrun_failed(lines)
        traceback = last_traceback(lines)
        if traceback:
            return Cause(traceback[-1], traceback, log, exit_code)
        if lines:
            return Cause(f"its workers ended without saying why: {lines[-1]}", lines[-5:], log, exit_code)
    return Cause("its workers ended without saying why", [], None, exit_code)


def _before_torchrun_failed(lines: list[str]) -> list[str]:
    """What ranks of the last attempt said that had no log yet, without torchrun's own words and its traceback, which
    say only that."""
    failed = [-1, *(index for index, line in enumerate(lines) if _TORCHRUN_FAILURE.search(line))]
    said = [line for line in lines[failed[-2] + 1 : failed[-1]] if not _TORCHRUN_SAYS.match(line)] if failed[1:] else []
    return said or lines


def _rank_of(log: Path) -> int:
    return int("".join(re.findall(r"\d+", log.stem)) or 0)


def _first_failure(run: RunDirectory, node_log: Path | None) -> _Failure | None:
    """Of each node's torchrun the last report; of those the earliest, which took the others along."""
    failures = []
    for log in sorted(node_log.parent.glob("node-*.log")) if node_log else []:
        lines = tail(log)
        matches = [match for match in map(_TORCHRUN_FAILURE.search, lines) if match]
        if not matches:
            continue
        when, code, local_rank, pid = matches[-1].groups()
        host = next((match[1] for match in map(_NODE_HOST.search, lines) if match), None)
        rank = _rank_with(run, host, int(pid or 0))
        failures.append(_Failure(when or "", int(local_rank) if rank is None else rank, host, int(code)))
    return min(failures, key=lambda failure: failure.time, default=None)


def _killed_torchrun(node_log: Path | None) -> Cause | None:
    for log in sorted(node_log.parent.glob("node-*.log")) if node_log else []:
        for line in tail(log):
            match = _KILLED_TORCHRUN.match(line)
            if match:
                return Cause(line, [], log, None, None, match[1])
    return None


def _rank_with(run: RunDirectory, host: str | None, pid: int) -> int | None:
    """The rank that is this process, from the heartbeats; null where it had not written one."""
    for rank, beat in run.heartbeats().items():
        if beat.pid == pid and host in (None, beat.host):
            return rank
    return None


def _describe(rank: int, exit_code: int) -> str:
    if exit_code >= 0:
        return f"rank {rank} exited with code {exit_code}"
    name = signal_name(-exit_code)
    hint = " (often the kernel, out of memory)" if name == "SIGKILL" else ""
    return f"rank {rank} was killed by {name}{hint}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
