"""Measure the parts of the time to the first step of an attempt, and record them in `events.jsonl`."""

from __future__ import annotations

import os
import time

from trainer.runs.events import FirstStep
from trainer.runtime.attempt import Attempt
from trainer.runtime.process import NODE_BEGAN_VARIABLE


class StartClock:
    """Adds up the time to the first step by part.

    Args:
        attempt: The attempt, whose heartbeat has the time until now.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, part: str) -> None:
        """Count the time since the last part ended as time of `part`."""
        now = time.monotonic()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now

    def follow(self, phase: str) -> None:
        """Follow the phases of the heartbeat; the first step ends when the phase `train` begins."""
        if phase == "first_step":
            self.end("restore" if self._attempt.first_step else "build")
        elif phase == "train" and "first_step" not in self._seconds:
            self.end("first_step")
            self._record()

    def _record(self) -> None:
        heartbeat, seconds = self._attempt.heartbeat, {"import": self._attempt.heartbeat.import_s, **self._seconds}
        began, node_began = heartbeat.began, os.environ.get(NODE_BEGAN_VARIABLE)
        if node_began and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            seconds = {"node": max(0.0, began - float(node_began)), **seconds}
            began = float(node_began)
        rounded = {part: round(value, 3) for part, value in seconds.items()}
        event = FirstStep(attempt=self._attempt.rank.attempt, step=heartbeat.step, began=began, seconds=rounded)
        self._attempt.directory.add_event(event)
