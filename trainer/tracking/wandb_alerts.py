"""Send a W&B alert for each hang, straggler and bad step that `events.jsonl` records, whichever process wrote it."""

from __future__ import annotations

import threading
import time
from typing import Any

from trainer.core.secrets import mask
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Notified
from trainer.runs.trouble import trouble_of, without_repetitions

POLL_S = 2.0
_PREFIX = "wandb:"
_LEVELS = {"hang": "ERROR", "straggler": "WARN", "nan": "WARN"}


class TroubleAlerts:
    """Looks for new troubles in a thread of the first rank until `end`.

    Each alert is an event `notified`, so that the next attempt sends no alert twice, and sends those that the attempt
    before it could not, such as of a hang that has ended it.

    Args:
        experiment: wandb's Run.
        run: The run directory.
        every_s: Seconds between two looks.
    """

    def __init__(self, experiment: Any, run: RunDirectory, every_s: float = POLL_S) -> None:
        self._experiment, self._run, self._every_s = experiment, run, every_s
        self._size = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="W&B alerts", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while True:
            self._look()
            if self._ended.wait(self._every_s):
                return

    def _look(self) -> None:
        try:
            size = self._run.events_path.stat().st_size
            if size != self._size:
                self._size = size
                self._send()
        except Exception as error:  # of the file system, of W&B: no reason to fail the training
            print(f"wandb: an alert was not sent: {type(error).__name__}: {error}", flush=True)

    def _send(self) -> None:
        events = self._run.events()
        told = [event for event in events if isinstance(event, Notified) and event.key.startswith(_PREFIX)]
        sent, last = {event.key for event in told}, {event.about.removeprefix(_PREFIX): event.time for event in told}
        found = [trouble for event in events if (trouble := trouble_of(event)) is not None]
        new = [trouble for trouble in found if f"{_PREFIX}{trouble.key}" not in sent]
        for trouble in without_repetitions(new, last, time.time()):
            title, text = f"{self._run.path.name} {trouble.title}", mask(trouble.reason or trouble.title)
            self._experiment.alert(title=title, text=text, level=_LEVELS[trouble.kind])
            key = f"{_PREFIX}{trouble.key}"
            self._run.add_event(Notified(about=f"{_PREFIX}{trouble.kind}", key=key, channels=["wandb"]))

    def end(self) -> None:
        """Look once more, and end the thread."""
        self._ended.set()
        self._thread.join(self._every_s)
        self._look()
