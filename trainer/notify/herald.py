"""Start the sending of notifications beside the process that observes a run, which waits for it only at the end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from trainer.core import processes
from trainer.core.files import open_regular
from trainer.notify.deliver import options_of
from trainer.notify.due import NOTABLE_EVENTS
from trainer.runs.directory import RunDirectory

_POLL_S = 1.0
_REMIND_S = 60.0
_START_S = 10.0
"""Seconds that the process may take in addition to the channels, such as to import on a busy file system."""
_MARKS = tuple(f'"event": "{name}"'.encode() for name in NOTABLE_EVENTS)
_MOST_BYTES = 1 << 20


class Herald:
    """Has notifications sent for one run, if it has a channel, by one process at a time. Never raises.

    Args:
        run: The run.
        by_verb: Use `trainer notify`, which finds out the state of the run: for an observer outside of the job.
        output: Where the process writes a line on each message; None: where this one does.
    """

    def __init__(self, run: RunDirectory, *, by_verb: bool = False, output: int | IO[Any] | None = None) -> None:
        self._run = run
        path = str(run.path.absolute())
        self._command = ("trainer", "notify", path) if by_verb else ("trainer.notify", path)
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._polled = 0.0
        self._is_due = False
        options = _options(run)
        self._limit_s = float(options["timeout_s"]) + _START_S if options else 0.0
        self._offset = _size(run.events_path)
        """The events up to here were observed by another process, or by this one."""

    def poll(self) -> None:
        """Start a process if a notable event has happened since the last call. Costs a `stat` a second."""
        now = time.monotonic()
        if not self._limit_s or now - self._polled < _POLL_S:
            return
        self._polled = now
        self._look()
        if self._is_running():
            if now - self._started > self._limit_s:
                self._kill()
        elif self._is_due:
            self.start()

    def remind(self) -> None:
        """Start a process if the last one was started a minute ago: for what is due by time, or by a silent death."""
        if time.monotonic() - self._started >= _REMIND_S:
            self.start()

    def start(self) -> None:
        """Start a process now, unless there is one or no channel."""
        if not self._limit_s or self._is_running():
            return
        self._is_due, self._started = False, time.monotonic()
        try:
            self._process = subprocess.Popen(
                processes.python_module(*self._command),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
            )
        except OSError as error:
            print(f"notify: not sent: {error}", file=sys.stderr, flush=True)

    def close(self, *, is_due: bool = False) -> None:
        """Send what is left, and wait for it: no longer than the channels may take.

        Args:
            is_due: Start a process even if there was no event.
        """
        if not self._limit_s:
            return
        self._wait()
        self._look()
        if self._is_due or is_due:
            self.start()
            self._wait()

    def _look(self) -> None:
        size = _size(self._run.events_path)
        if size <= self._offset:
            return
        try:
            with open_regular(self._run.events_path) as file:
                file.seek(max(self._offset, size - _MOST_BYTES))
                text = file.read(_MOST_BYTES)
        except OSError:
            return
        self._offset = size
        self._is_due = self._is_due or any(mark in text for mark in _MARKS)

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _wait(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(max(0.0, self._started + self._limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            print(f"notify: not sent within {self._limit_s:g} s", file=sys.stderr, flush=True)
            processes.kill_tree(self._process.pid)
            self._process.wait()


def _options(run: RunDirectory) -> Mapping[str, Any] | None:
    try:
        return options_of(run)
    except Exception as error:  # notifications must not fail a run
        print(f"notify: {error}", file=sys.stderr, flush=True)
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
