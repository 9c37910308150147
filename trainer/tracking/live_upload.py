"""Upload what an active run logs offline, while it logs it: `wandb beta sync --live`, one process per run.

The client follows a segment until its run ends. A segment whose process was killed has no end, and the client would
wait forever. So it is ended once the server has all rows of the segment, which is then marked as the client does it: an
upload by `wandb sync` would send the rows again.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

from trainer.core import processes
from trainer.runs.directory import RunDirectory
from trainer.tracking.upload import accepted, environment, is_uploaded, mark_uploaded, segments_of, upload

_SENDS_EVERY_S = 16.0
"""The client sends rows every 15 s."""
_GRACE_S = 90.0
"""Seconds after the end of a segment in which the server may get its rows."""


class LiveUpload:
    """The upload of one run; call `poll` until it returns True, then `end`.

    Args:
        run: The run.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._segment: Path | None = None
        self._client: subprocess.Popen[bytes] | None = None
        self._ended_at: float | None = None
        """When the segment was first seen to have ended; None: it is still written."""

    def poll(self, is_active: bool) -> bool:
        """Follow the newest segment; return whether the run is over and its segments are uploaded or given up."""
        newest = next(reversed(segments_of(self.run)), None)
        if self._segment is not None and (not is_active or newest != self._segment):
            self._ended_at = self._ended_at or time.monotonic()
            if not self._is_drained(self._segment, self._ended_at):
                return False
            self._stop_client()
            self._segment = self._ended_at = None
        if is_active and newest is not None and self._segment is None and not is_uploaded(newest):
            if any(not is_uploaded(path) for path in segments_of(self.run) if path != newest):
                upload(self.run, leave_out=newest)  # the rows of earlier attempts come first
            self._start_client(newest)
        return not is_active

    def _is_drained(self, segment: Path, ended_at: float) -> bool:
        """Return whether the segment, which is no longer written, is uploaded, or the client cannot upload it."""
        if is_uploaded(segment) or self._client is None or self._client.poll() is not None:
            return True
        waited_s = time.monotonic() - ended_at
        if waited_s < _SENDS_EVERY_S:
            return False
        answer = accepted(self.run, segment)
        if answer is not None and answer.served >= answer.rows:
            mark_uploaded(segment)
            return True
        return waited_s > _GRACE_S

    def end(self) -> None:
        """End the client."""
        self._stop_client()

    def _start_client(self, segment: Path) -> None:
        self._segment = segment
        self._client = subprocess.Popen(
            processes.python_module("wandb", "beta", "sync", "--live", "--yes", str(segment.parent)),
            cwd=self.run.path,
            env=environment(self.run),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _stop_client(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        if client.poll() is None:
            client.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(10)
        if client.poll() is None:
            processes.kill_tree(client.pid)
        client.wait()
