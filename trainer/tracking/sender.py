"""Send what is logged to a tracking server from a thread, in order, so that no outage slows or ends a training."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from trainer.core.secrets import mask
from trainer.core.text import one_line

PAUSE_S = 10.0
"""Seconds between two tries while the server does not answer."""
_CLOSING_PAUSE_S = 1.0
_LONGEST_QUEUE = 50_000
Call = Callable[[], object]


class Sender:
    """A queue of calls and the thread that makes them.

    Args:
        name: Name of the tracker, for messages.
        is_refusal: Whether an exception says that the server refused this call, so that another try is useless.
        timeout_s: Seconds that all calls of `close` together wait for the queue.
    """

    def __init__(self, name: str, is_refusal: Callable[[Exception], bool], timeout_s: float) -> None:
        self._name, self._is_refusal, self._left_s = name, is_refusal, timeout_s
        self._calls: deque[Call] = deque(maxlen=_LONGEST_QUEUE)
        self._wake = threading.Condition()
        self._is_closing = False
        self._said: set[str] = set()
        self._thread: threading.Thread | None = None

    def put(self, call: Call) -> None:
        """Add a call. A full queue loses its oldest one: metrics.jsonl has it, and the next attempt sends it."""
        with self._wake:
            self._calls.append(call)
            self._wake.notify()
            if self._thread is None:  # also after `close`: Lightning ends a logger before the run does
                self._is_closing = False
                self._thread = threading.Thread(target=self._run, name=f"{self._name}-sender", daemon=True)
                self._thread.start()

    def close(self) -> int:
        """Wait until the queue is empty, or `timeout_s`; return the number of calls that were not made."""
        began = time.monotonic()
        with self._wake:
            self._is_closing, thread = True, self._thread
            self._wake.notify()
        if thread is not None:
            thread.join(self._left_s)
        self._left_s = max(0.0, self._left_s - (time.monotonic() - began))
        left = len(self._calls)
        if left:
            print(f"{self._name}: the server did not take the last {left} of what was logged", flush=True)
        return left

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._calls:
                    if self._is_closing:
                        self._thread = None
                        return
                    self._wake.wait()
                call = self._calls[0]
            if self._make(call):
                with self._wake:
                    if self._calls and self._calls[0] is call:
                        self._calls.popleft()
            else:
                self._pause()

    def _make(self, call: Call) -> bool:
        """Return whether the call is done with: made, or refused."""
        try:
            call()
        except Exception as error:
            if self._is_refusal(error):
                self._say(f"refused: {error}")
                return True
            self._say(f"{error}; training continues, and what is logged is sent once the server answers")
            return False
        return True

    def _pause(self) -> None:
        if self._is_closing:
            time.sleep(_CLOSING_PAUSE_S)
            return
        until = time.monotonic() + PAUSE_S
        with self._wake:
            while not self._is_closing and (left_s := until - time.monotonic()) > 0:
                self._wake.wait(left_s)

    def _say(self, text: str) -> None:
        line = one_line(mask(text))[:500]
        if line not in self._said and len(self._said) < 100:
            self._said.add(line)
            print(f"{self._name}: {line}", flush=True)
