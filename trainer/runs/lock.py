"""Allow one launch of a run at a time: a lock for the node process, and a fence for writers that it did not stop."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.core import records
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.locks import try_lock
from trainer.runs.directory import RunDirectory
from trainer.runs.records import LockHolder
from trainer.runs.registry import reference_to

_DYING_S = 5.0
"""The kernel releases the lock of a killed launch only once its processes are gone."""
_OTHER_HOST_S = 120.0
"""The lock of a host that is down lasts until the file server expires it (NFSv4: a lease of 90 s)."""

_LAUNCHING_S = 120.0
"""A launch takes seconds, and on SLURM up to the timeout of a few commands."""


class RunLock:
    """`control/lock`, held from `take` until this process ends, however it ends."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._path = run.stop_request.parent / "lock"
        self._descriptor: int | None = None

    def take(self, attempt: int) -> None:
        """Take the lock. On a file system without locks only the fence protects the run.

        Args:
            attempt: The first attempt of this launch.

        Raises:
            UserError: Another launch of this run is alive.
        """
        self._path.parent.mkdir(exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        began = time.monotonic()
        while (locked := try_lock(descriptor)) is False:
            holder = self._holder(descriptor)
            patience_s = _DYING_S if holder is not None and holder.host == socket.gethostname() else _OTHER_HOST_S
            if time.monotonic() - began > patience_s:
                os.close(descriptor)
                raise self._refusal(holder)
            time.sleep(0.2)
        if locked is None:
            os.close(descriptor)
            return
        os.ftruncate(descriptor, 0)
        mine = LockHolder(host=socket.gethostname(), pid=os.getpid(), attempt=attempt)
        os.pwrite(descriptor, records.dumps(mine).encode(), 0)
        self._descriptor = descriptor

    @property
    def is_taken(self) -> bool:
        """Whether a launch has taken the lock, which may have ended since."""
        try:
            return self._path.stat().st_size > 0
        except FileNotFoundError:
            return False

    def _holder(self, descriptor: int) -> LockHolder | None:
        try:
            return records.from_json(LockHolder, json.loads(os.pread(descriptor, 4096, 0)), self._path)
        except (ValueError, records.BadRecord):  # another launch has taken it and not written it yet
            return None

    def _refusal(self, holder: LockHolder | None) -> UserError:
        name = reference_to(self._run)
        pid, host, attempt = (holder.pid, holder.host, holder.attempt) if holder else ("?", "?", "?")
        where = f"process {pid} on {host}, attempt {attempt}"
        return UserError(
            f"{self._run.path.name} is already being trained ({where}); two launches would overwrite checkpoints",
            f"follow it: trainer logs -f {name}; stop it: trainer stop {name}",
        )


@contextmanager
def launching(run: RunDirectory) -> Iterator[None]:
    """Let one command at a time launch a run: from its look at the state to the record of the new process.

    Otherwise two that see the run ended both write its configuration and `launch.json`, and the second one, whose
    process is refused, is what the run is known by.

    Raises:
        UserError: Another command has been launching it for long.
    """
    path = run.stop_request.with_name("launching")
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        began = time.monotonic()
        while try_lock(descriptor) is False:
            if time.monotonic() - began > _LAUNCHING_S:
                raise UserError(f"{run.path.name} is being launched by another command", "wait for it, or end it")
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def refuse_if_superseded(run: RunDirectory, attempt: int) -> None:
    """Check, before a save, that this is still the newest attempt of the run.

    Raises:
        EnvironmentFault: A later attempt has begun and owns the files now.
    """
    newest = run.next_attempt() - 1
    if newest > attempt:
        raise EnvironmentFault(
            f"attempt {newest} of this run has begun; attempt {attempt} must no longer write",
            "nothing is lost, the later attempt continues; find out why this one was not ended",
        )
