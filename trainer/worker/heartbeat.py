"""`live/rank-R.json`: where this rank stands, written once a second by a thread, so that a step pays nothing for it.

`time` says that the process lives, `moved` when its step or phase last changed: a hang has a fresh `time` and an old
`moved`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from trainer.runs.files import write_atomic
from trainer.worker.process import Rank


class Heartbeat:
    """Set `step` directly (the hot path), the rest through `update`."""

    def __init__(self, path: Path, rank: Rank, every_s: float = 1.0) -> None:
        self.path = path
        self.step = 0
        self.progress = 0
        """Raised by what moves without a step, such as a batch of a validation."""
        self._fields: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "attempt": rank.attempt,
            "epoch": 0,
            "phase": "start",
            "metrics": {},
        }
        self._seen: tuple[int, str] = (0, "")
        self._moved = time.time()
        self._every_s = every_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.write()
        self._thread.start()

    def update(self, **fields: Any) -> None:
        """Change fields, `step` among them; they are on disk within a second."""
        self.step = fields.pop("step", self.step)
        with self._lock:
            self._fields.update(fields)

    def write(self) -> None:
        """Write now. A file system that refuses is no reason to end a training."""
        with self._lock:
            fields = dict(self._fields)
        now = time.time()
        if (self.step, fields["phase"]) != self._seen:
            self._seen, self._moved = (self.step, fields["phase"]), now
        try:
            beat = {"time": now, "moved": self._moved, "step": self.step, "progress": self.progress, **fields}
            write_atomic(self.path, json.dumps(beat))
        except OSError:
            pass

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            self.write()

    def stop(self, phase: str) -> None:
        """Write a last time with `phase` and end the thread."""
        self.update(phase=phase)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self.write()
