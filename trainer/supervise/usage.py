"""Record what the attempts of a node process use: devices, time, and energy from the counters of the node.

A thread, because a driver that hangs must not keep the supervisor from noticing that the ranks hang.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType

from trainer.config.shape import LaunchShape
from trainer.core.hardware import usable_cores
from trainer.hardware.energy import Counters, counters_of
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated
from trainer.runs.records import HeartbeatRecord, NodeUsage

EVERY_S = 10.0
"""Longest time between two readings; a process that is killed loses at most one interval. RAPL's counters, which start
again after 262 kJ on some processors, cannot do so twice within it."""
POLL_S = 0.5
"""Seconds until a new attempt is noticed."""
_JOIN_S = 5.0


class UsageRecorder:
    """Context in which what the attempts use is recorded every `EVERY_S` seconds and at the end.

    No error in it ends the run: what cannot be read is not measured, what cannot be written is reported once.

    Args:
        run: The run.
        node: Number of this node.
        shape: Shape of the attempt.
        attempt: Returns the number of the newest attempt.
        environment: The environment of the ranks.
    """

    def __init__(
        self,
        run: RunDirectory,
        node: int,
        shape: LaunchShape,
        attempt: Callable[[], int],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._run, self._node, self._shape, self._attempt = run, node, shape, attempt
        self._environment = environment
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._record, name="usage", daemon=True)
        self._reported = False

    def __enter__(self) -> UsageRecorder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(_JOIN_S)

    def _record(self) -> None:
        try:
            self._begin()
            read_at = time.monotonic()
            while not self._ended.wait(POLL_S):
                if self._attempt() != self._usage.attempt:
                    self._read()
                    self._next_attempt()
                elif time.monotonic() - read_at < min(EVERY_S, max(1.0, 0.1 * (time.monotonic() - self._since))):
                    continue
                else:
                    self._read()
                read_at = time.monotonic()
            self._read()
        except Exception as error:  # a driver, a file system: neither is a reason to end a training
            self._report(error)

    def _begin(self) -> None:
        attempt = self._attempt()
        allocated = [event for event in self._run.events_of(Allocated) if event.attempt == attempt]
        began = allocated[-1].since if allocated else None
        if allocated and began is None:  # restarted in the same allocation, whose nodes were held meanwhile
            before = [usage for usage in self._run.usage() if usage.node == self._node and usage.attempt < attempt]
            began = before[-1].began + before[-1].seconds if before else None
        now = time.time()
        # Not earlier than a day before: a record with another clock cannot make the job expensive.
        began = began if began is not None and now - 86400 < began < now else now
        self._offset_s, self._since = now - began, time.monotonic()
        self._joules: dict[str, dict[str, float]] = {}
        self._beat: HeartbeatRecord | None = None
        is_gpu = self._shape.device == "cuda"
        held = self._shape.processes_per_node if is_gpu else usable_cores(self._environment)
        try:
            self._counters = counters_of(self._shape.processes_per_node if is_gpu else 0, self._environment)
        except Exception as error:  # whatever a driver does
            self._counters = Counters(missing={"gpu" if is_gpu else "cpu": f"{type(error).__name__}: {error}"})
        measured = self._counters.measured("gpu") if is_gpu else held * bool(self._counters.measured("cpu"))
        self._usage = NodeUsage(
            attempt=attempt,
            node=self._node,
            host=socket.gethostname(),
            device="gpu" if is_gpu else "cpu",
            devices=held * (1 + self._spare_nodes()),
            measured=measured,
            began=began,
            seconds=self._offset_s,
            joules={},
            missing={str(part): reason for part, reason in self._counters.missing.items()},
        )
        self._write()

    def _spare_nodes(self) -> int:
        """Return the number of nodes of the allocation that the attempt does not use; 0 except on node 0."""
        allocated = self._environment.get("SLURM_JOB_NUM_NODES", "")
        return max(0, int(allocated) - self._shape.nodes) if self._node == 0 and allocated.isdigit() else 0

    def _next_attempt(self) -> None:
        """Continue in the record of the attempt that torchrun has started."""
        self._joules, self._beat = {}, None
        began = self._usage.began + self._usage.seconds
        self._offset_s, self._since = 0.0, time.monotonic()
        self._usage = replace(self._usage, attempt=self._attempt(), began=began, seconds=0.0, joules={})
        self._write()

    def _read(self) -> None:
        shares = self._shares()
        for part, joules in self._counters.used().items():
            phases = self._joules.setdefault(part, {})
            for phase, share in shares.items():
                phases[phase] = phases.get(phase, 0.0) + joules * share
        seconds = self._offset_s + time.monotonic() - self._since
        self._usage = replace(
            self._usage,
            seconds=round(seconds, 3),
            joules={
                part: {phase: round(joules, 3) for phase, joules in phases.items()}
                for part, phases in self._joules.items()
            },
        )
        self._write()

    def _shares(self) -> dict[str, float]:
        """Return the share of each phase in the time since the last reading, as the node's first rank has spent it."""
        beat = self._run.live.of_rank(self._node * self._shape.processes_per_node, self._node)
        if beat is None or beat.attempt != self._usage.attempt or not beat.spent:
            return {self._beat.phase if self._beat else "start": 1.0}
        before = (self._beat.spent if self._beat else None) or {}
        spent = {phase: max(0.0, seconds - before.get(phase, 0.0)) for phase, seconds in beat.spent.items()}
        if self._beat is None:
            alive_s = time.monotonic() - self._since
            spent["start"] = spent.get("start", 0.0) + max(0.0, alive_s - sum(spent.values()))
        self._beat = beat
        total = sum(spent.values())
        return {phase: seconds / total for phase, seconds in spent.items() if seconds} if total else {beat.phase: 1.0}

    def _write(self) -> None:
        try:
            self._run.write_usage(self._usage)
        except OSError as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        if not self._reported:
            self._reported = True
            print(f"what the run uses cannot be recorded: {type(error).__name__}: {error}", flush=True)
