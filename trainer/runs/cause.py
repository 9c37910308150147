"""Find the root cause of a failed attempt in its logs: the rank that failed first, not those that lost their peer."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.core.files import read_bytes
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Failure

_TAIL_BYTES = 256 * 1024
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""Prefix of torch.distributed for each line of an uncaught exception."""
TRACEBACK = "Traceback (most recent call last):"
LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|connectFullMesh|DistNetworkError"
    r"|DistStoreError|NCCL|gloo|\bTCPStore\b|Timed out waiting",
    re.IGNORECASE,
)
"""Messages of a rank that lost its connection to another one. It is blamed only if no other rank has a message."""
_TORCHRUN_FAILURE = re.compile(
    r"(?:^E(\d{4} [\d:.]+) .*)?failed \(exitcode: (-?\d+)\) local_rank: (\d+)(?: \(pid: (\d+)\))?"
)
"""Log line of torchrun for a rank that failed: torch/distributed/elastic/multiprocessing/api.py."""
_TORCHRUN_LINE = re.compile(r"[EWI]\d{4} [\d:.]+ ")
"""Beginning of a line of torchrun's log."""
_NODE_HOST = re.compile(r"^attempt \d+: .* on (\S+)$")
"""First line of the log of trainer/supervise/supervisor.py."""
_KILLED_TORCHRUN = re.compile(r"^torchrun on (\S+) was killed by ")
"""Its line for a torchrun that was killed."""
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

    time: str
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
    if cause.rank is None and cause.log is not None and cause.log.name.startswith("rank-"):
        cause = replace(cause, rank=_rank_of(cause.log))
    if cause.rank is not None and cause.host is None:
        beat = run.heartbeat(cause.rank)
        cause = replace(cause, host=beat.host if beat else None)
    return cause


def _find(run: RunDirectory, attempt: int, node_log: Path | None) -> Cause:
    failure = _first_failure(run, node_log)
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
            return Cause(f"its workers ended without an error message: {lines[-1]}", lines[-5:], log, exit_code)
    return Cause("its workers ended without an error message", [], None, exit_code)


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


def _first_failure(run: RunDirectory, node_log: Path | None) -> _Failure | None:
    """Return the root cause by torchrun: the earliest of the nodes' latest reports."""
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
