"""Uploads of committed checkpoints to the object store, one at a time, while training and later saves go on.

This module does not import torch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from trainer.checkpoint.remote import RemoteStore
from trainer.core.errors import TrainerError

log = logging.getLogger(__name__)

MOST_WAITING = 2
"""Uploads that may be unfinished when a save begins; training waits for more, so that the disk does not fill up."""


class Uploads:
    """Uploads this rank's part of each checkpoint, in the order of the saves, which all ranks share.

    Args:
        remote: The object store.
        rank: Number of this rank; rank 0 makes a checkpoint visible.
        ranks: Number of ranks that upload.
        on_uploaded: Called on rank 0, in the thread, once a checkpoint is in the store.
    """

    def __init__(
        self,
        remote: RemoteStore,
        rank: int = 0,
        ranks: int = 1,
        on_uploaded: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.remote = remote
        self.on_uploaded = on_uploaded
        self.on_wait: Callable[[], None] = lambda: None
        """Called about once a second while something waits for uploads, which end by limits of their own."""
        self._rank, self._ranks = rank, ranks
        self._thread: ThreadPoolExecutor | None = None
        self._unfinished: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def submit(self, path: Path, alone: bool = False) -> None:
        """Upload a checkpoint of the run directory, after those before it; `alone`: all of it, from this rank."""
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "checkpoint-upload")
            self._unfinished[path.name] = self._thread.submit(self._upload, path, 1 if alone else self._ranks)

    def names(self) -> list[str]:
        """Return the names of the checkpoints that are not yet uploaded, oldest first."""
        with self._lock:
            return list(self._unfinished)

    def wait(self, most_left: int = 0) -> None:
        """Wait until at most `most_left` uploads are unfinished."""
        with self._lock:
            waiting = list(self._unfinished.values())
        for one in waiting[: max(0, len(waiting) - most_left)]:
            while wait([one], timeout=1.0).not_done:
                self.on_wait()

    def close(self) -> None:
        """Wait for all uploads and end the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def take_failure(self) -> BaseException | None:
        """Return and clear the error of an upload since the last call, if any."""
        failure, self._failure = self._failure, None
        return failure

    def _upload(self, path: Path, ranks: int) -> None:
        try:
            uploaded = self.remote.holds(path) or self.remote.upload(path, self._rank, ranks)
            if uploaded and self._rank == 0:
                self.on_uploaded(path)
        except BaseException as error:
            expected = isinstance(error, TrainerError)
            log.error("Uploading %s failed: %s", path.name, error, exc_info=None if expected else error)
            self._failure = error
        finally:
            with self._lock:
                self._unfinished.pop(path.name, None)
