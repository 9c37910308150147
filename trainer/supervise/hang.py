"""What the node process does about a job that stands still: stacks, a name, an end; torchrun then restarts it. One that
is only held up by a slow rank goes on, and the rank is named.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from trainer.core import processes
from trainer.core.errors import HUNG
from trainer.runs.cause import Cause
from trainer.runs.directory import RunDirectory
from trainer.supervise import torchrun
from trainer.supervise.collectives import Missing, missing
from trainer.supervise.stragglers import StragglerWatch, read_paces
from trainer.supervise.watchdog import STACKS_SUFFIX, Allowances, Hang, HangWatch, blame, read_places, uneven

_LOOK_EVERY_S = 0.5
_COMPARE_EVERY_S = 1.0
_STACKS_WITHIN_S = 3.0
"""A process that runs at all writes its stacks in milliseconds."""
_TRACES_WITHIN_S = 10.0
"""The heartbeat's thread looks once a second whether its trace of collectives is wanted; a rank may be stopped."""


class HangWatcher:
    """Watches the newest attempt of a launch; `found` has the cause of each attempt that hung."""

    def __init__(self, run: RunDirectory, ranks: int, node_log: Path, records: bool) -> None:
        """`node_log`: where torchrun's own stack goes. `records`: of several nodes one writes the event; each ends its
        own workers."""
        self.found: dict[int, Cause] = {}
        self._run = run
        self._ranks = ranks
        self._node_log = node_log
        self._records = records
        self._allowances = Allowances.of(run.config()["resilience"])
        self._attempt = -1
        self._watch = HangWatch(self._allowances, time.monotonic())
        self._looked = self._compared = 0.0
        self._stragglers = StragglerWatch(0, 0)

    def look(self, attempt: int, torchrun_pid: int) -> Cause | None:
        """End this node's workers if the job hangs, and say why."""
        now = time.monotonic()
        if attempt != self._attempt:
            self._attempt, self._watch = attempt, HangWatch(self._allowances, now)
            options = self._run.config()["resilience"]
            self._stragglers = StragglerWatch(
                float(options.get("straggler_factor", 0)), float(options.get("straggler_after_s", 30))
            )
        self._compare(now)
        if self._allowances.factor == 0 or attempt in self.found or now - self._looked < _LOOK_EVERY_S:
            return None
        self._looked = now
        hang = self._watch.look(read_places(self._run.live_dir, attempt), now)
        return None if hang is None else self._end(hang, attempt, torchrun_pid)

    def _compare(self, now: float) -> None:
        """Name a rank that the others wait for at every step."""
        if not self._records or not self._stragglers.factor or now - self._compared < _COMPARE_EVERY_S:
            return
        self._compared = now
        found = self._stragglers.look(read_paces(self._run.live_dir, self._attempt, self._ranks), now)
        if found is not None:
            self._run.event("straggler", attempt=self._attempt, **found.fields())
            print(f"straggler: {found}", flush=True)

    def _evidence(self, attempt: int, pids: list[int], traces: dict[int, Path]) -> Missing | None:
        """Have the stacks and, of several ranks, the traces written; the collective that a rank has not come to."""
        deadline = time.monotonic() + _TRACES_WITHIN_S
        if len(traces) > 1:
            self._run.collectives_request(attempt).touch()
        _dump_stacks(pids, self._run.logs_dir / f"attempt-{attempt:02d}")
        if len(traces) < 2:
            return None
        while time.monotonic() < deadline and not all(path.exists() for path in traces.values()):
            time.sleep(0.1)
        return missing(traces)

    def _end(self, hang: Hang, attempt: int, torchrun_pid: int) -> Cause:
        folder = self._run.logs_dir / f"attempt-{attempt:02d}"
        # Where there is no rank yet, it is torchrun that hangs; it imports for them, too (agent.py).
        workers = torchrun.workers(torchrun_pid) or [torchrun_pid, *processes.children(torchrun_pid)]
        traces = {place.rank: self._run.collectives_trace(attempt, place.rank) for place in hang.places}
        late: Missing | None = None
        try:
            late = self._evidence(attempt, [pid for pid in workers if processes.handles(pid, signal.SIGUSR2)], traces)
        except Exception as error:  # whatever becomes of the evidence, the ranks must not go on standing there
            print(f"hang: the evidence is not complete: {type(error).__name__}: {error}", flush=True)
        answered = [rank for rank, path in traces.items() if path.exists()]
        blamed = blame(hang, folder, late.ranks if late else [], answered)
        place = blamed.place
        who = f"rank {place.rank} on {place.host}" if place else "the job"
        stands = f" (step {place.step}, {place.phase})" if place else ""
        reason = (
            f"{who}{stands} did not move for {hang.still_s:.0f} s, {hang.allowed_s:.0f} s are allowed: {blamed.where}"
        ) + "".join(f"; {more}" for more in (late, uneven(hang.places)) if more)
        log = folder / f"rank-{place.rank}{STACKS_SUFFIX}" if place else self._node_log
        self.found[attempt] = Cause(reason, [], log, HUNG, place.rank if place else None, place.host if place else None)
        if self._records:
            self._run.event(
                "hang",
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
        print(f"hang: {reason}; its workers are killed", flush=True)
        for pid in workers:
            processes.send(pid, signal.SIGKILL)
        return self.found[attempt]


def _dump_stacks(pids: list[int], folder: Path) -> None:
    """Ask for the stacks and wait until all files have them, or no longer grow."""
    before = {path: path.stat().st_size for path in folder.glob(f"rank-*{STACKS_SUFFIX}")}
    for pid in pids:
        processes.send(pid, signal.SIGUSR2)
    deadline = time.monotonic() + _STACKS_WITHIN_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        written = [path for path, size in before.items() if path.stat().st_size > size]
        if len(written) >= len(pids):
            time.sleep(0.1)  # a dump is several writes
            return
