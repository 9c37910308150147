"""Find the root cause of a failed attempt in its logs: the rank that failed first, not those that lost their peer."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.core.files import no_space_on, read_bytes
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Failure

_TAIL_BYTES = 256 * 1024
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""Prefix of torch.distributed for each line of an uncaught exception."""
TRACEBACK = "Traceback (most recent call last):"
LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|connectFullMesh|DistNetworkError"
    r"|DistStoreError|NCCL|\bgloo\b|ProcessGroupGloo|\bTCPStore\b|Timed out waiting",
    re.IGNORECASE,
)
"""Messages of a rank that lost its connection to another one. It is blamed only if no other rank has a message."""
_TORCHRUN_FAILURE = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)(?: \(pid: (\d+)\))?")
"""Log line of torchrun for a rank that failed: torch/distributed/elastic/multiprocessing/api.py."""
_TORCHRUN_ROW = re.compile(
    r"^  time +: (\S+)\n  host +: .*\n  rank +: \d+ \(local_rank: (\d+)\)\n  exitcode +: (-?\d+) \(pid: (\d+)\)", re.M
)
"""One of the failures that torchrun lists when it gives up: torch/distributed/elastic/multiprocessing/errors."""
_TORCHRUN_LINE = re.compile(r"[EWIV](\d{4}) (\d\d:\d\d:\d\d)(\.\d+) ")
"""Beginning of a line of torchrun's log: month and day, local time (torch/_logging)."""
_ZONE_S = 900
"""Every two time zones differ by a multiple of a quarter of an hour."""
_QUIET_S, _FARTHEST_ZONE_S = 1800, 26 * 3600
"""A log that changed this long after torchrun's last line, or before it, was written in another time zone; one that
changed later still was copied."""
_TOGETHER_S = 2.0
"""A rank that loses its peer mostly fails within this time of it, and torchrun may report it in its place."""
_NODE_HOST = re.compile(r"^attempt \d+: .* on (\S+)$")
"""First line of the log of trainer/supervise/supervisor.py."""
_KILLED_TORCHRUN = re.compile(r"^torchrun on (\S+) was killed by ")
"""Its line for a torchrun that was killed."""
UNEXPLAINED = "its workers ended without an error message"
TRACEBACK_BEGINS, TRACEBACK_ENDS = "--- traceback of what ended this rank", "--- end of the traceback"
"""Lines of a rank's log around a traceback; a terminal that follows the log does not show it."""
FAILURE_VARIABLE = "TRAINER_FAILURE"
"""Environment variable of the ranks of a command: the file for the error of the first rank that fails."""


def failures(run: RunDirectory, attempt: int) -> list[Failure]:
    """Return the recorded failures of an attempt: those that are final, then root causes, then by time."""
    return sorted(
        run.failures(attempt), key=lambda one: (not one.is_final, bool(LOST_PEER.search(one.reason)), one.time)
    )


@dataclass(frozen=True)
class Cause:
    """Why an attempt died."""

    reason: str
    """The exception, or a sentence."""
    lines: list[str]
    """The traceback, or the last lines of the log without one."""
    log: Path | None
    """The log with more."""
    exit_code: int | None
    """Exit code of the rank that failed first by torchrun's report; negative: the signal that killed it."""
    rank: int | None = None
    host: str | None = None
    where: str | None = None
    """The line of the user's code that raised the exception."""
    mend: bool = False
    """Whether a resume fails in the same way until the code, the configuration or the files are changed."""


def tail(path: Path, max_bytes: int = _TAIL_BYTES) -> list[str]:
    """Return the last lines of a file without torch's rank prefix; empty if it cannot be read."""
    try:
        text = read_bytes(path, max_bytes, end=True).decode(errors="replace")
    except OSError:
        return []
    return [_RANK_PREFIX.sub("", line) for line in text.splitlines()]


def is_traceback(cause: Cause) -> bool:
    """Return whether the reason is an exception."""
    return bool(cause.lines) and cause.lines[0].startswith(TRACEBACK)


def last_traceback(lines: list[str]) -> list[str]:
    """Return the lines from the last `Traceback` to that of the exception; empty without one.

    Only the first line of the exception's message is certain: what follows may be other output.
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
    """A failed rank in the report of its node's torchrun."""

    time: float
    """Seconds since 1970."""
    rank: int
    host: str | None
    exit_code: int


def find(run: RunDirectory, attempt: int, node_log: Path | None = None) -> Cause:
    """Return why an attempt died.

    Args:
        run: The run.
        attempt: The number of the attempt.
        node_log: The log of a node process, which has the output of torchrun. Logs of other nodes are next to it.
    """
    cause = _find(run, attempt, node_log)
    is_explained = not cause.reason.startswith(UNEXPLAINED) and not LOST_PEER.search(cause.reason)
    if not is_explained and (full := no_space_on(run.path)):
        cause = replace(cause, reason=f"{full}; {cause.reason}")
    if cause.rank is None and cause.log is not None and cause.log.name.startswith("rank-"):
        cause = replace(cause, rank=_rank_of(cause.log))
    if cause.rank is not None and cause.host is None:
        beat = run.heartbeat(cause.rank)
        cause = replace(cause, host=beat.host if beat else None)
    return cause


def _find(run: RunDirectory, attempt: int, node_log: Path | None) -> Cause:
    failure = _first_failure(run, attempt, node_log)
    exit_code = failure.exit_code if failure else None
    recorded = failures(run, attempt)
    if recorded and not LOST_PEER.search(recorded[0].reason):
        first = recorded[0]
        log = run.rank_log(attempt, first.rank)
        return Cause(first.reason, [], log, exit_code, first.rank, None, first.where, first.mend)
    candidates: list[tuple[int, float, Cause]] = []
    for log in run.rank_logs(attempt).values():
        traceback = last_traceback(tail(log))
        if not traceback:
            continue
        cause = Cause(traceback[-1], traceback, log, exit_code)
        candidates.append((1 if LOST_PEER.search(traceback[-1]) else 0, _changed_at(log), cause))
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
            return Cause(f"{UNEXPLAINED}: {lines[-1]}", lines[-5:], log, exit_code)
    return Cause(UNEXPLAINED, [], None, exit_code)


def _before_torchrun_failed(lines: list[str]) -> list[str]:
    """Return the output of ranks of the last attempt that did not have their own log yet.

    It is between the last two failures that torchrun reports; torchrun's own lines and its traceback are left out.
    """
    failed = [-1, *(index for index, line in enumerate(lines) if _TORCHRUN_FAILURE.search(line))]
    if not failed[1:]:
        return lines
    between = lines[failed[-2] + 1 : failed[-1]]
    return [line for line in between if not _TORCHRUN_LINE.match(line)] or lines


def _changed_at(log: Path) -> float:
    try:
        return log.stat().st_mtime
    except OSError:  # deleted since it was read
        return 0.0


def _rank_of(log: Path) -> int:
    return int("".join(re.findall(r"\d+", log.stem)) or 0)


def _first_failure(run: RunDirectory, attempt: int, node_log: Path | None) -> _Failure | None:
    """Return the root cause by torchrun: the earliest of the nodes' latest reports.

    Of those that failed together it is one that did not only lose its peer.
    """
    reported = [one for log in _node_logs(node_log) for one in _reported(run, log)]
    first = min((one.time for one in reported), default=0.0)
    lost_peer = _ranks_that_lost_a_peer(run, attempt)
    return min(
        (one for one in reported if one.time - first <= _TOGETHER_S),
        key=lambda one: (one.exit_code == -signal.SIGTERM or one.rank in lost_peer, one.time),
        default=None,
    )


def _ranks_that_lost_a_peer(run: RunDirectory, attempt: int) -> set[int]:
    ends = {rank: last_traceback(tail(log))[-1:] for rank, log in run.rank_logs(attempt).items()}
    ends |= {one.rank: [one.reason] for one in run.failures(attempt)}
    return {rank for rank, reason in ends.items() if reason and LOST_PEER.search(reason[0])}


def _node_logs(node_log: Path | None) -> list[Path]:
    return sorted(node_log.parent.glob("node-*.log")) if node_log else []


def _reported(run: RunDirectory, log: Path) -> Iterator[_Failure]:
    """Yield the failures in the latest report of a node's torchrun: the first one, and those of the same second."""
    lines = tail(log)
    at = max((index for index, line in enumerate(lines) if _TORCHRUN_FAILURE.search(line)), default=None)
    if at is None:
        return
    host = next((match[1] for match in map(_NODE_HOST.search, lines) if match), None)
    when = _time_of(lines, at, _changed_at(log))

    def failure(exit_code: str, local_rank: str, pid: str | None) -> _Failure:
        rank = _rank_with(run, host, int(pid or 0))
        return _Failure(when, int(local_rank) if rank is None else rank, host, int(exit_code))

    first = _TORCHRUN_FAILURE.search(lines[at])
    assert first is not None
    yield failure(*first.groups())
    rows = _TORCHRUN_ROW.findall("\n".join(lines[at:]))
    second = next((row[0] for row in rows if row[3] == first[3]), None)
    for at_second, local_rank, exit_code, pid in rows:
        if at_second == second and pid != first[3]:
            yield failure(exit_code, local_rank, pid)


def _time_of(lines: list[str], index: int, changed_at: float) -> float:
    """Return the time of a line of torchrun in seconds since 1970.

    torchrun logs neither year nor time zone. They follow from its last line: the log was not changed much later.

    Args:
        lines: The log.
        index: The line.
        changed_at: When the log was last changed. It is returned if the line has no time, as by `TORCH_LOGS_FORMAT`.
    """
    stamps = [match for match in map(_TORCHRUN_LINE.match, lines) if match]
    line = _TORCHRUN_LINE.match(lines[index])
    of_line = _local_time(line, changed_at) if line else None
    of_last = _local_time(stamps[-1], changed_at) if stamps else None
    if of_line is None or of_last is None:
        return changed_at
    late_s = changed_at - of_last
    is_local = -60 < late_s < _QUIET_S or abs(late_s) > _FARTHEST_ZONE_S
    return of_line + (0 if is_local else _ZONE_S * round(late_s / _ZONE_S))


def _local_time(stamp: re.Match[str], near: float) -> float | None:
    """Return a local time of torchrun's log in the year that brings it next to `near`; None if it is no time."""
    year = time.localtime(near).tm_year
    times = []
    for one in (year - 1, year, year + 1):
        try:
            second = time.mktime(time.strptime(f"{one}{stamp[1]} {stamp[2]}", "%Y%m%d %H:%M:%S"))
        except (ValueError, OverflowError):  # 29 February, or no time at all
            continue
        times.append(second + float(stamp[3]))
    return min(times, key=lambda one: abs(one - near), default=None)


def _killed_torchrun(node_log: Path | None) -> Cause | None:
    for log in _node_logs(node_log):
        for line in tail(log):
            match = _KILLED_TORCHRUN.match(line)
            if match:
                return Cause(line, [], log, None, None, match[1])
    return None


def _rank_with(run: RunDirectory, host: str | None, pid: int) -> int | None:
    """Return the rank of a process from the heartbeats; None if it wrote no heartbeat."""
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
    """Return the name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
