"""Start the node process of a job while the job is still being checked: `python -m trainer.supervise.ahead FD`.

Importing torch takes longer than all else before the first step, and needs nothing but the launch shape. So `trainer
fit` starts this process once the configuration is composed. It starts the fork server, which imports, imports what a
node process needs, and waits for the job on the socket FD. When the socket is closed without one (the job has a
mistake), both processes end.

What was imported is kept only if a new process would have imported the same (`agent.take_over`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import TypeVar

from trainer.core import processes, records
from trainer.core.errors import TrainerError

_HEADER = 8
"""Bytes of the length that comes before a message."""
_MOST_FDS = 64

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StartImporting:
    """The first message to a node process that waits for its job."""

    environment: dict[str, str]
    """The environment of the fork server, as far as it is known."""


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """The second message: the job, beside descriptors of its output and of the locks that it holds open."""

    run: str
    """The run directory."""
    environment: dict[str, str]
    """The environment of the node process."""


class NodeAhead:
    """A node process that waits for its job.

    Args:
        variables: The environment of the fork server, as far as it is known.
    """

    def __init__(self, variables: dict[str, str]) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                processes.python_module("trainer.supervise.ahead", str(theirs.fileno())),
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        self._has_job = False
        with contextlib.suppress(OSError):  # it has died, which `start` returns
            send(self._channel, StartImporting(environment=variables), [])

    def start(self, run_dir: str, variables: dict[str, str], log: int, locks: list[int]) -> bool:
        """Give it the job, with the descriptor of its log and those that it holds open; return whether it has it."""
        try:
            send(self._channel, NodeJob(run=run_dir, environment=variables), [log, log, *locks])
        except OSError:  # it has died
            return False
        self._has_job = self.process.poll() is None
        return self._has_job

    def close(self) -> None:
        """End it, unless it has a job."""
        self._channel.close()
        if not self._has_job:
            self.process.kill()
            self.process.wait()


def send(channel: socket.socket, message: object, descriptors: list[int]) -> None:
    """Send a record with descriptors. Raises OSError if the other side is gone."""
    content = records.dumps(message).encode()
    socket.send_fds(channel, [len(content).to_bytes(_HEADER, "big")], descriptors)
    channel.sendall(content)


def receive(channel: socket.socket, kind: type[T]) -> tuple[T, list[int]] | None:
    """Wait for a record and its descriptors; None if the other side has closed the socket.

    Raises:
        BadRecord: What came is no such record.
    """
    header, descriptors, _, _ = socket.recv_fds(channel, _HEADER, _MOST_FDS)
    if len(header) < _HEADER:
        return None
    content, length = b"", int.from_bytes(header, "big")
    while len(content) < length:  # not a byte more: the next message may have come, with descriptors
        if not (part := channel.recv(length - len(content))):
            return None
        content += part
    return records.loads(kind, content, "the message to the node process"), descriptors


def main() -> int:
    """Start the fork server, wait for the job, and be its node process."""
    from trainer.supervise import torchrun  # starts the fork server before the rest is imported

    channel = socket.socket(fileno=int(sys.argv[1]))
    known = receive(channel, StartImporting)
    if known is None:
        return 0
    torchrun.start_spare(known[0].environment)
    from trainer.supervise import node

    received = receive(channel, NodeJob)
    if received is None:
        return 0
    job, (stdout, stderr, *_) = received  # the others are locks on GPUs, open until this process ends
    channel.close()
    os.environ.clear()
    os.environ.update(job.environment)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    sys.argv = [node.__file__, job.run]
    return node.main_then()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
