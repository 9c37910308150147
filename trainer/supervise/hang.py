"""Handle hangs and report stragglers, in the node process.

On a hang it collects stacks and collective traces, determines the rank that caused it, and kills the workers; torchrun
then restarts them. A job with a straggler continues, and the rank is reported.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from trainer.core import processes
from trainer.core.errors import HUNG
from trainer.runs import events
from trainer.runs.cause import Cause
from trainer.runs.directory import RunDirectory
from trainer.supervise import torchrun
from trainer.supervise.collectives import Missing, missing
from trainer.supervise.stragglers import StragglerWatch, read_paces
from trainer.supervise.watchdog import Allowances, Hang, HangWatch, blame, read_places, uneven

_CHECK_EVERY_S = 0.5
_COMPARE_EVERY_S = 1.0
_STACKS_WITHIN_S = 3.0
"""A process that runs at all writes its stacks within milliseconds."""
_TRACES_WITHIN_S = 10.0
"""The heartbeat thread of a rank checks once a second whether its trace is requested; a rank may be stopped."""


class HangWatcher:
    """Watches the newest attempt of a launch for hangs and stragglers.

    Args:
        run: The run.
        ranks: Number of ranks of the job.
        node_log: Log file that has the stacks of torchrun itself.
        records: Whether this node writes events. One of several nodes does; each kills its own workers.
    """

    def __init__(self, run: RunDirectory, ranks: int, node_log: Path, records: bool) -> None:
        self.causes: dict[int, Cause] = {}
        """Hung attempt to its cause."""
        self._run = run
        self._ranks = ranks
        self._node_log = node_log
        self._records = records
        self._allowances = Allowances.of(run.config()["resilience"])
        self._attempt = -1
        self._watch = HangWatch(self._allowances, time.monotonic())
        self._checked = self._compared = 0.0
        self._stragglers = StragglerWatch(0, 0)

    def check(self, attempt: int, torchrun_pid: int) -> Cause | None:
        """Kill the workers of this node if the job hangs, and return the cause."""
        now = time.monotonic()
        if attempt != self._attempt:
            self._attempt, self._watch = attempt, HangWatch(self._allowances, now)
            options = self._run.config()["resilience"]
            self._stragglers = StragglerWatch(
                float(options.get("straggler_factor", 0)), float(options.get("straggler_after_s", 30))
            )
        self._compare(now)
        if self._allowances.factor == 0 or attempt in self.causes or now - self._checked < _CHECK_EVERY_S:
            return None
        self._checked = now
        hang = self._watch.check(read_places(self._run, attempt), now)
        return None if hang is None else self._end(hang, attempt, torchrun_pid)

    def _compare(self, now: float) -> None:
        """Report a straggler."""
        if not self._records or not self._stragglers.factor or now - self._compared < _COMPARE_EVERY_S:
            return
        self._compared = now
        straggler = self._stragglers.check(read_paces(self._run, self._attempt, self._ranks), now)
        if straggler is not None:
            self._run.add_event(straggler.event(self._attempt))
            print(f"straggler: {straggler}", flush=True)

    def _evidence(self, attempt: int, pids: list[int], traces: dict[int, Path]) -> Missing | None:
        """Collect stacks and, with several ranks, collective traces; return the collective that lacks a rank."""
        deadline = time.monotonic() + _TRACES_WITHIN_S
        if len(traces) > 1:
            self._run.collectives_request(attempt).touch()
        _dump_stacks(pids, self._run.existing_stacks(attempt))
        if len(traces) < 2:
            return None
        while time.monotonic() < deadline and not all(path.exists() for path in traces.values()):
            time.sleep(0.1)
        return missing(traces)

    def _end(self, hang: Hang, attempt: int, torchrun_pid: int) -> Cause:
        """Collect evidence, record the hang and kill the workers of this node."""
        # Without a rank it is torchrun that hangs, or the import that it does for all ranks (agent.py).
        workers = torchrun.workers(torchrun_pid) or [torchrun_pid, *processes.children(torchrun_pid)]
        traces = {place.rank: self._run.collectives_trace(attempt, place.rank) for place in hang.places}
        late: Missing | None = None
        try:
            late = self._evidence(attempt, [pid for pid in workers if processes.handles(pid, signal.SIGUSR2)], traces)
        except Exception as error:  # the workers must be killed whatever happens to the evidence
            print(f"hang: evidence is incomplete: {type(error).__name__}: {error}", flush=True)
        answered = [rank for rank, path in traces.items() if path.exists()]
        blamed = blame(hang, self._run, attempt, late.ranks if late else [], answered)
        place = blamed.place
        who = f"rank {place.rank} on {place.host}" if place else "the job"
        position = f" (step {place.step}, {place.phase})" if place else ""
        reason = (
            f"{who}{position} made no progress for {hang.still_s:.0f} s (limit {hang.allowed_s:.0f} s): {blamed.where}"
        ) + "".join(f"; {more}" for more in (late, uneven(hang.places)) if more)
        log = self._run.stacks(attempt, place.rank) if place else self._node_log
        cause = Cause(reason, [], log, HUNG, place.rank if place else None, place.host if place else None)
        self.causes[attempt] = cause
        if self._records:
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
        print(f"hang: {reason}; killing its workers", flush=True)
        for pid in workers:
            processes.send(pid, signal.SIGKILL)
        return cause


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
