"""`live/rank-R.json`: where this rank stands, written once a second by a thread, so that a step pays nothing for it.

`time` says that the process lives, `moved` when its step or phase last changed: a hang has a fresh `time` and an old
`moved`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from trainer.core import processes
from trainer.runs.directory import RunDirectory
from trainer.runs.records import HeartbeatRecord
from trainer.runtime.process import Rank

BATCHES_OF_MEDIAN = 64


class Heartbeat:
    """Set `step` directly and append to `batches` (the hot path); change the rest through `update`."""

    def __init__(self, directory: RunDirectory, rank: Rank, every_s: float = 1.0) -> None:
        self._directory, self._rank = directory, rank
        self.step = 0
        self.progress = 0
        """Raised by what moves without a step, such as a batch of a validation."""
        self.batches: deque[tuple[float, float]] = deque(maxlen=BATCHES_OF_MEDIAN)
        """Of the last batches the seconds from the end of the one before to the backward pass, in which this rank waits
        for no other (`own_s`), and those of the whole batch (`batch_s`)."""
        self.forwards: deque[float] = deque(maxlen=BATCHES_OF_MEDIAN)
        """Seconds of forward passes on a GPU, by its own clock (`forward_s`)."""
        self.data: deque[float] = deque(maxlen=BATCHES_OF_MEDIAN)
        """Seconds before the forward pass (`data_s`), where the ranks wait for each other inside of it."""
        self.on_beat: Callable[[], None] = _nothing
        """Called by the heartbeat's thread; what it raises is printed once, and ends nothing."""
        self.waited_s: Callable[[], float] = float
        """Seconds waited for batches so far: the class `data`, taken from the phase in which they fell."""
        self._waited_before = 0.0
        self._fields: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "attempt": rank.attempt,
            "epoch": 0,
            "phase": "start",
            "metrics": {},
        }
        import_s = _age_of_this_process_s() + float(os.environ.get("TRAINER_IMPORT_S", "0"))  # supervise/agent.py
        self._began = time.time() - import_s
        self._spent: dict[str, float] = {"import": import_s}
        """Seconds by phase, of those that are over: `runs/ledger.py` adds them up."""
        self._phase_since = time.monotonic()
        self._first_step: int | None = None
        self._seen: tuple[int, str] = (0, "")
        self._moved = time.time()
        self._every_s = every_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._keep_the_last_attempts()
        self.write()
        self._thread.start()

    def update(self, **fields: Any) -> None:
        """Change fields, `step` among them; they are on disk within a second."""
        self.step = fields.pop("step", self.step)
        with self._lock:
            if "phase" in fields and fields["phase"] != self._fields["phase"]:
                now, phase = time.monotonic(), self._fields["phase"]
                self._spent = self._spent_until(now)
                self._phase_since, self._waited_before = now, self.waited_s()
                if phase == "build":
                    self._first_step = self.step
            self._fields.update(fields)

    def write(self) -> None:
        """Write now. A file system that refuses is no reason to end a training."""
        with self._lock:
            fields = dict(self._fields)
            spent = self._spent_until(time.monotonic())
        fields |= {"began": self._began, "spent": {phase: round(value, 3) for phase, value in spent.items()}}
        fields |= self._medians()
        fields["first_step"] = self.step if self._first_step is None else self._first_step
        now = time.time()
        if (self.step, fields["phase"]) != self._seen:
            self._seen, self._moved = (self.step, fields["phase"]), now
        try:
            beat = HeartbeatRecord(time=now, moved=self._moved, step=self.step, progress=self.progress, **fields)
            self._directory.write_heartbeat(self._rank.rank, beat)
        except OSError:
            pass

    def _spent_until(self, now: float) -> dict[str, float]:
        """`_spent` and the phase that goes on; waits for data are a class of their own."""
        spent, phase = dict(self._spent), self._fields["phase"]
        elapsed_s = now - self._phase_since
        waited_s = min(self.waited_s() - self._waited_before, elapsed_s)
        spent[phase] = spent.get(phase, 0.0) + elapsed_s - waited_s
        if waited_s:
            spent["data"] = spent.get("data", 0.0) + waited_s
        return spent

    def _medians(self) -> dict[str, float]:
        """By which `supervise/stragglers.py` compares the ranks."""
        found: dict[str, float] = {"batches": len(self.batches)}
        batches, forwards = list(self.batches), list(self.forwards)
        if batches:
            own_s, batch_s = zip(*batches, strict=True)
            found["own_s"] = round(statistics.median(own_s), 6)
            found["batch_s"] = round(statistics.median(batch_s), 6)
        if data := list(self.data):
            found["data_s"] = round(statistics.median(data), 6)
        if forwards:
            found["forward_s"] = round(statistics.median(forwards), 6)
        return found

    def _keep_the_last_attempts(self) -> None:
        """This rank's heartbeat of the attempt before this one goes beside it."""
        rank, before = self._rank, self._directory.heartbeat(self._rank.rank)
        if before is None or before.attempt == rank.attempt:
            return
        with contextlib.suppress(OSError):
            past = self._directory.past_heartbeat_path(before.attempt, rank.rank)
            os.rename(self._directory.heartbeat_path(rank.rank), past)

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            self.write()
            try:
                self.on_beat()
            except Exception as error:  # in one line: a traceback would be taken for the cause of a later death
                print(f"what goes with the heartbeat ends: {type(error).__name__}: {error}", flush=True)
                self.on_beat = _nothing

    def stop(self, phase: str) -> None:
        """Write a last time with `phase` and end the thread."""
        self.update(phase=phase)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self.write()


def _nothing() -> None:
    """Until there is something to do on a beat."""


def _age_of_this_process_s() -> float:
    """Seconds since this process was started (Linux; elsewhere 0)."""
    ticks = processes.started_ticks(os.getpid())
    if ticks is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
