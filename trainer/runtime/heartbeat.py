"""Write the heartbeat of a rank once a second in a thread, so that a step costs nothing.

On one node it is `live/rank-R.json` of the run directory; on several the node process gets it (`runs/node_folder.py`).

`time` shows that the process is alive, `moved` when its step or phase last changed. On a hang `time` is recent and
`moved` is old.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from trainer.core import processes
from trainer.runs.directory import RunDirectory
from trainer.runs.node_folder import NodeFolder
from trainer.runs.records import HeartbeatRecord
from trainer.runtime.process import Rank

BATCHES_OF_MEDIAN = 64


class DeviceBatch(NamedTuple):
    """Seconds of one batch by the clock of a GPU, under the names of `runs.records.HeartbeatRecord`."""

    own_s: float
    """From the end of the previous batch to the end of the forward pass."""
    batch_s: float
    data_s: float | None
    """From the end of the previous batch to the start of this one; None: not measured."""
    forward_s: float | None
    """The forward pass or, where ranks wait for each other in it, one block of it times the number of blocks."""


class Heartbeat:
    """The heartbeat of a rank. In the hot path, set `step` and append to `batches`; set the rest by `update`.

    Args:
        directory: The run.
        rank: The rank.
        every_s: Seconds between two beats.
    """

    def __init__(self, directory: RunDirectory, rank: Rank, every_s: float = 1.0) -> None:
        self._directory, self._rank = directory, rank
        self._node = NodeFolder.of_this_rank()
        self.step = 0
        self.progress = 0
        """Counts progress without a step, such as a batch of a validation."""
        self.batches: deque[tuple[float, float]] = deque(maxlen=BATCHES_OF_MEDIAN)
        """Seconds of the latest batches: from the end of the previous batch to the backward pass, in which this rank
        does not wait for others (`own_s`), and of the whole batch (`batch_s`)."""
        self.device_batches: deque[DeviceBatch] = deque(maxlen=BATCHES_OF_MEDIAN)
        """Batches by the clock of the GPU, which replace the times of the host."""
        self.data: deque[float] = deque(maxlen=BATCHES_OF_MEDIAN)
        """Seconds before the forward pass (`data_s`), if the ranks wait for each other in the forward pass."""
        self.on_beat: Callable[[], None] = _nothing
        """Called in the heartbeat thread. An exception is printed once and disables it."""
        self.on_phase: Callable[[str], None] = _nothing
        """Called with each new phase, in the thread that sets it."""
        self.samplers: list[Callable[[], None]] = []
        """Called in the heartbeat thread before `on_beat`. One that raises is removed."""
        self.waited_s: Callable[[], float] = float
        """Returns the seconds waited for batches so far: the class `data`, subtracted from the phase they were in."""
        self._waited_before = 0.0
        self._fields: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "attempt": rank.attempt,
            "epoch": 0,
            "phase": "start",
            "metrics": {},
        }
        self.import_s = processes.age_s() + float(os.environ.get("TRAINER_IMPORT_S", "0"))  # supervise/fork_server.py
        """Seconds that this process, or the one that forked it, spent on importing."""
        self.began = time.time() - self.import_s
        """When that began, in seconds since 1970."""
        self._spent: dict[str, float] = {"import": self.import_s}
        """Seconds of completed phases; `runs/ledger.py` adds them up."""
        self._phase_since = time.monotonic()
        self._first_step: int | None = None
        self._seen: tuple[int, str] = (0, "")
        self._moved = time.time()
        self._every_s = every_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat and start the thread."""
        if self._node is None:
            self._directory.live.keep(self._rank.attempt, rank=self._rank.rank)
        self.write()
        self._thread.start()

    def update(self, **fields: Any) -> None:
        """Set fields, `step` among them. They are on disk within a second."""
        self.step = fields.pop("step", self.step)
        with self._lock:
            if "phase" in fields and fields["phase"] != self._fields["phase"]:
                now, phase = time.monotonic(), self._fields["phase"]
                self._spent = self._spent_until(now)
                self._phase_since, self._waited_before = now, self.waited_s()
                if phase == "build":
                    self._first_step = self.step
            self._fields.update(fields)
        if "phase" in fields:
            self.on_phase(fields["phase"])

    def count_progress(self) -> None:
        """Count progress without a step: what takes long is no hang."""
        self.progress += 1

    def write(self) -> None:
        """Write now. An error of the file system must not end the training."""
        with self._lock:
            fields = dict(self._fields)
            spent = self._spent_until(time.monotonic())
        fields |= {"began": self.began, "spent": {phase: round(value, 3) for phase, value in spent.items()}}
        fields |= self._medians()
        fields["first_step"] = self.step if self._first_step is None else self._first_step
        now = time.time()
        if (self.step, fields["phase"]) != self._seen:
            self._seen, self._moved = (self.step, fields["phase"]), now
        try:
            beat = HeartbeatRecord(time=now, moved=self._moved, step=self.step, progress=self.progress, **fields)
            (self._node or self._directory).write_heartbeat(self._rank.rank, beat)
        except OSError:
            pass

    def _spent_until(self, now: float) -> dict[str, float]:
        """Return `_spent` plus the current phase. Waiting for data is a separate class."""
        spent, phase = dict(self._spent), self._fields["phase"]
        elapsed_s = now - self._phase_since
        waited_s = min(self.waited_s() - self._waited_before, elapsed_s)
        spent[phase] = spent.get(phase, 0.0) + elapsed_s - waited_s
        if waited_s:
            spent["data"] = spent.get("data", 0.0) + waited_s
        return spent

    def _medians(self) -> dict[str, float]:
        """Return the medians by which `supervise/stragglers.py` compares the ranks."""
        medians: dict[str, float] = {"batches": len(self.batches)}
        batches = list(self.batches)
        if batches:
            own_s, batch_s = zip(*batches, strict=True)
            medians["own_s"] = round(statistics.median(own_s), 6)
            medians["batch_s"] = round(statistics.median(batch_s), 6)
        if data := list(self.data):
            medians["data_s"] = round(statistics.median(data), 6)
        on_device = list(self.device_batches)
        for name in DeviceBatch._fields:
            if values := [value for batch in on_device if (value := getattr(batch, name)) is not None]:
                medians[name] = round(statistics.median(values), 6)
        return medians

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            self.write()
            for sampler in list(self.samplers):
                try:
                    sampler()
                except Exception as error:
                    print(f"heartbeat sampler removed: {type(error).__name__}: {error}", flush=True)
                    self.samplers.remove(sampler)
            try:
                self.on_beat()
            except Exception as error:  # one line: a traceback would be taken for the root cause later
                print(f"heartbeat hook disabled: {type(error).__name__}: {error}", flush=True)
                self.on_beat = _nothing

    def stop(self, phase: str) -> None:
        """Write a last heartbeat with `phase` and end the thread."""
        self.update(phase=phase)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self.write()


def _nothing(*_: object) -> None:
    """Do nothing; the default hook."""
