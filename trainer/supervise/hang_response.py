"""Handle hangs and report stragglers, in the node process.

Once `hang_detection.py` has found one, it collects stacks and collective traces, determines the rank that caused it,
and kills the workers; torchrun then restarts them. A job with a straggler continues, and the rank is reported.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.core import processes, records
from trainer.core.errors import HUNG
from trainer.core.files import write_atomic
from trainer.runs import events
from trainer.runs.cause import Cause
from trainer.runs.directory import RunDirectory
from trainer.runs.node_folder import NodeFolder
from trainer.runs.records import HangFound, HeartbeatRecord
from trainer.supervise import torchrun
from trainer.supervise.collectives import Missing, missing
from trainer.supervise.hang_detection import Allowances, Hang, HangDetector, Place, blame, places_of, uneven
from trainer.supervise.stragglers import StragglerWatch, paces_of

_CHECK_EVERY_S = 0.5
_LOOK_EVERY_S = 0.25
"""Seconds between two looks for evidence."""
_STACKS_WITHIN_S = 3.0
"""A process that runs at all writes its stacks within milliseconds."""
_TRACES_WITHIN_S = 10.0
"""The heartbeat thread of a rank checks once a second whether its trace is requested; a rank may be stopped."""


@dataclass(frozen=True)
class Watched:
    """What a node process watches.

    On several nodes the first one watches all ranks. The others wait for what it finds, collect the evidence of their
    own ranks and kill them.
    """

    run: RunDirectory
    ranks: int
    """Number of ranks of the job."""
    own: range
    """Ranks of this node."""
    node_log: Path
    """Log file that has the stacks of torchrun itself."""
    folder: NodeFolder | None = None
    """Where the ranks of this node look for requests; None: the job has one node."""

    @property
    def is_first(self) -> bool:
        """Whether this is the first node."""
        return self.own.start == 0


class HangHandler:
    """Watches the newest attempt of a launch for hangs and stragglers."""

    def __init__(self, watched: Watched) -> None:
        self.causes: dict[int, Cause] = {}
        """Hung attempt to its cause."""
        self._watched, self._run = watched, watched.run
        options = watched.run.config()["resilience"]
        self._allowances = Allowances.of(options)
        self._straggler_options = float(options.get("straggler_factor", 0)), float(options.get("straggler_after_s", 30))
        self._attempt = -1
        self._watch = HangDetector(self._allowances, time.monotonic())
        self._stragglers = StragglerWatch(*self._straggler_options)
        self._checked = 0.0

    def check(self, attempt: int, torchrun_pid: int) -> Cause | None:
        """Kill the workers of this node if the job hangs, and return the cause."""
        now = time.monotonic()
        if attempt != self._attempt:
            self._attempt, self._watch = attempt, HangDetector(self._allowances, now)
            self._stragglers = StragglerWatch(*self._straggler_options)
        if self._watched.folder is None and now - self._checked < _CHECK_EVERY_S:
            return None  # on several nodes the caller looks as seldom as it should
        self._checked = now
        detects = self._allowances.factor != 0 and attempt not in self.causes
        if not self._watched.is_first:
            return self._follow(attempt, torchrun_pid) if detects else None
        if not (detects or self._stragglers.factor):
            return None
        beats = self._run.heartbeats()
        if self._stragglers.factor:
            self._report_straggler(beats, now)
        hang = self._watch.check(places_of(beats, attempt), now) if detects else None
        return None if hang is None else self._end(hang, attempt, torchrun_pid)

    def _report_straggler(self, beats: dict[int, HeartbeatRecord], now: float) -> None:
        straggler = self._stragglers.check(paces_of(beats, self._attempt, self._watched.ranks), now)
        if straggler is not None:
            self._run.add_event(straggler.event(self._attempt))
            print(f"straggler: {straggler}", flush=True)

    def _request_evidence(self, attempt: int, pids: list[int]) -> None:
        """Have the ranks of this node write their collectives, if there are several in all, and their stacks."""
        if self._watched.ranks > 1:
            (self._watched.folder or self._run).collectives_request(attempt).touch()
        stacks = [self._run.stacks(attempt, rank) for rank in self._watched.own]
        _dump_stacks(
            [pid for pid in pids if processes.handles(pid, signal.SIGUSR2)], [path for path in stacks if path.exists()]
        )

    def _evidence(self, attempt: int, pids: list[int], places: Sequence[Place]) -> Missing | None:
        """Collect stacks and, with several ranks, collective traces; return the collective that lacks a rank."""
        deadline = time.monotonic() + _TRACES_WITHIN_S
        traces = {place.rank: self._run.collectives_trace(attempt, place.rank) for place in places}
        self._request_evidence(attempt, pids)
        if len(traces) < 2:
            return None
        while time.monotonic() < deadline and not {path.name for path in traces.values()} <= _names(attempt, self._run):
            time.sleep(_LOOK_EVERY_S)
        return missing(traces)

    def _follow(self, attempt: int, torchrun_pid: int) -> Cause | None:
        """Once the first node has found a hang, collect the evidence of this node's ranks, and kill them."""
        hang = records.read_or_skip(HangFound, self._run.hang_found(attempt))
        if hang is None:
            return None
        workers = _workers(torchrun_pid)
        deadline = time.monotonic() + _TRACES_WITHIN_S + _STACKS_WITHIN_S
        self._request_evidence(attempt, workers)
        # The ranks stay until the first node has seen everything: it records the cause then.
        while time.monotonic() < deadline and not self._run.attempt_record(attempt).exists():
            time.sleep(_LOOK_EVERY_S)
        outcome = self._run.outcome(attempt)
        reason = outcome.reason if outcome else f"the job made no progress for {hang.still_s:.0f} s"
        cause = Cause(reason, [], self._watched.node_log, HUNG)
        self.causes[attempt] = cause
        _kill(workers, reason)
        return cause

    def _end(self, hang: Hang, attempt: int, torchrun_pid: int) -> Cause:
        """Collect evidence, record the hang and kill the workers of this node."""
        if self._watched.folder is not None:
            found = HangFound(still_s=hang.still_s, allowed_s=hang.allowed_s)
            write_atomic(self._run.hang_found(attempt), records.dumps(found))
        workers = _workers(torchrun_pid)
        late: Missing | None = None
        try:
            late = self._evidence(attempt, workers, hang.places)
        except Exception as error:  # the workers must be killed whatever happens to the evidence
            print(f"hang: evidence is incomplete: {type(error).__name__}: {error}", flush=True)
        written = _names(attempt, self._run)
        answered = [
            place.rank for place in hang.places if self._run.collectives_trace(attempt, place.rank).name in written
        ]
        blamed = blame(hang, self._run, attempt, late.ranks if late else [], answered)
        place = blamed.place
        who = f"rank {place.rank} on {place.host}" if place else "the job"
        position = f" (step {place.step}, {place.phase})" if place else ""
        reason = (
            f"{who}{position} made no progress for {hang.still_s:.0f} s (limit {hang.allowed_s:.0f} s): {blamed.where}"
        ) + "".join(f"; {more}" for more in (late, uneven(hang.places)) if more)
        log = self._run.stacks(attempt, place.rank) if place else self._watched.node_log
        cause = Cause(reason, [], log, HUNG, place.rank if place else None, place.host if place else None)
        self.causes[attempt] = cause
        self._run.add_event(
            events.Hang(
                attempt=attempt,
                rank=place.rank if place else None,
                host=place.host if place else None,
                step=place.step if place else None,
                phase=place.phase if place else None,
                where=blamed.where,
                collective=late.what if late else None,
                still_s=round(hang.still_s, 1),
                reason=reason,
            )
        )
        _kill(workers, reason)
        return cause


def _workers(torchrun_pid: int) -> list[int]:
    """Return the ranks of this node. Without one it is torchrun that hangs, or the import for all ranks (agent.py)."""
    return torchrun.workers(torchrun_pid) or [torchrun_pid, *processes.children(torchrun_pid)]


def _kill(workers: list[int], reason: str) -> None:
    print(f"hang: {reason}; killing its workers", flush=True)
    for pid in workers:
        processes.send(pid, signal.SIGKILL)


def _names(attempt: int, run: RunDirectory) -> set[str]:
    """Return the names in the log folder of an attempt: one request for thousands of ranks."""
    try:
        return set(os.listdir(run.attempt_logs(attempt)))
    except OSError:  # no rank has written there
        return set()


def _dump_stacks(pids: list[int], files: list[Path]) -> None:
    """Request the stacks of these processes and wait until they are written, or `_STACKS_WITHIN_S` have passed."""
    before = {path: path.stat().st_size for path in files}
    for pid in pids:
        processes.send(pid, signal.SIGUSR2)
    deadline = time.monotonic() + _STACKS_WITHIN_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        written = [path for path, size in before.items() if path.stat().st_size > size]
        if len(written) >= len(pids):
            time.sleep(0.1)  # a dump is several writes
            return
