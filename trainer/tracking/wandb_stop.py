"""Stop a run from W&B's web page: by its Stop button (`wandb.Settings.stop_fn`), or by a tag, which is polled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

POLL_S = 30.0


class TagWatch:
    """Polls the tags of a W&B run in a thread, and calls a function when a tag is added.

    A tag that the run has when it starts was added before, for an earlier attempt: it counts once it was removed.

    Args:
        experiment: wandb's Run.
        tag: The tag.
        act: Called once, in the thread.
        every_s: Seconds between two requests.
    """

    def __init__(self, experiment: Any, tag: str, act: Callable[[], None], every_s: float = POLL_S) -> None:
        self._path, self._tag, self._act, self._every_s = experiment.path, tag, act, every_s
        self._was_there = tag in (experiment.tags or ())
        self._ended = threading.Event()
        threading.Thread(target=self._poll, name="tags of the W&B run", daemon=True).start()

    def _poll(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                is_there = self._tag in _tags_of(self._path)
            except Exception:  # of the network, of many kinds: the next poll may succeed
                continue
            if is_there and not self._was_there:
                self._act()
                return
            self._was_there = is_there

    def end(self) -> None:
        """End the thread."""
        self._ended.set()


def _tags_of(path: str) -> list[str]:
    import wandb

    return list(wandb.Api(timeout=10).run(path).tags or [])
