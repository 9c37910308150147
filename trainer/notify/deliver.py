"""One pass over a run: send what is due, and record it in `events.jsonl`. One process at a time does it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer.config.notify import channel_names, secrets_of
from trainer.core.locks import try_lock
from trainer.notify.due import due
from trainer.notify.message import Message, clean
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Notified
from trainer.runs.state import State

_PATIENCE_S = 5.0


def options_of(run: RunDirectory) -> Mapping[str, Any] | None:
    """Return the section `notify` of a run; None if it names no channel, or the run is older than the section."""
    options = run.config().get("notify")
    return options if options and channel_names(options) else None


def deliver(
    run: RunDirectory, state: State, *, why_it_waits: Callable[[], list[str]] | None = None
) -> list[tuple[Message, dict[str, str]]]:
    """Send the messages that are due; return each with its failures by channel. Never raises for a channel."""
    options = options_of(run)
    if options is None:
        return []
    from trainer.notify.channels import send  # the network's modules: for the process that sends only

    sent = []
    with _only_one(run) as is_mine:
        for one in due(run, options, state, why_it_waits=why_it_waits) if is_mine else []:
            message = clean(one.message, secrets_of(options, os.environ))
            failures = send(message, options)
            run.add_event(Notified(about=message.event, key=one.key, channels=channel_names(options), failed=failures))
            sent.append((message, failures))
    return sent


def report(message: Message, failures: Mapping[str, str], names: list[str]) -> str:
    """Return a line for a log on what was sent and what was not."""
    fine = [name for name in names if name not in failures]
    parts = [f"sent by {', '.join(fine)}"] if fine else []
    parts += [f"not sent by {name}: {reason}" for name, reason in failures.items()]
    return f"notify: {message.title}: {'; '.join(parts)}"


@contextmanager
def _only_one(run: RunDirectory) -> Iterator[bool]:
    """Hold the lock of the run's notifications; yields False if it is not free within `_PATIENCE_S`."""
    path = run.stop_request.with_name("notify.lock")
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # a run of somebody else, or a full disk
        yield False
        return
    try:
        yield _take(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while try_lock(descriptor) is False:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
