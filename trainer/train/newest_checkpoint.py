"""The checkpoint from which an attempt starts: rank 0 chooses, all ranks verify and download."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.checkpoint import commit, tiers
from trainer.checkpoint.commit import Staging
from trainer.checkpoint.remote import RemoteStore
from trainer.checkpoint.store import Checkpoint
from trainer.core.errors import EnvironmentFault, UserError
from trainer.runs import events
from trainer.runtime.attempt import Attempt
from trainer.runtime.torch_setup import Group
from trainer.train.checkpoint_saver import Stores

Result = TypeVar("Result")
_NO_GOOD_CHECKPOINT = (
    "every checkpoint of this run is damaged; starting again from step 0 would hide that",
    "the damaged ones are kept as checkpoints/bad-*; start a new run, or restore one from a backup",
)


def choose(attempt: Attempt, stores: Stores, group: Group | None) -> Checkpoint | None:
    """Return the newest good checkpoint; None: start from step 0. Collective.

    Rank 0 chooses, so that all load the same step. One that is only in the object store is downloaded into the run
    directory, and one that is only there is uploaded.
    """
    remote = stores.uploads.remote if stores.uploads is not None else None
    ranks = Ranks(group, remote, attempt.rank.attempt)

    def newest() -> Checkpoint | UserError | None:
        starts = [(event.time, event.step) for event in attempt.directory.events_of(events.Started)]
        found, skipped = tiers.newest_good(stores.run, stores.local, starts, ranks.verify)
        if remote is not None:
            found = _newer_one(remote, found, skipped, ranks)
        for message in skipped:
            print(f"checkpoint skipped: {message}", flush=True)
            attempt.directory.add_event(events.CheckpointSkipped(reason=message))
        return UserError(*_NO_GOOD_CHECKPOINT) if skipped and found is None else found

    chosen = ranks.lead(newest)
    if isinstance(chosen, UserError):
        raise chosen
    if stores.uploads is not None and ranks.rank == 0:
        remote = stores.uploads.remote
        remote.clean_leftovers()
        held = remote.committed()
        remote.record(held)
        for one in stores.run.committed():
            if one.path not in [other.path for other in held]:
                stores.uploads.submit(one.path, alone=True)
    return chosen


def _newer_one(remote: RemoteStore, found: Checkpoint | None, skipped: list[str], ranks: Ranks) -> Checkpoint | None:
    """Return the newest good checkpoint of the object store, downloaded, if it is newer than `found`.

    Raises:
        EnvironmentFault: The store cannot be read: it may hold a newer one than the run directory.
    """
    newest_first = sorted(remote.committed(), key=lambda one: (one.step, one.is_before_end), reverse=True)
    for candidate in newest_first:
        if found is not None and candidate.step <= found.step:
            break
        problems = ranks.fetch(candidate.path.name)
        if not problems:
            print(f"checkpoint {candidate.path.name} restored from {remote.objects.url}", flush=True)
            return Checkpoint.read(candidate.path)
        skipped.append(f"{remote.objects.url}/{candidate.path.name} is damaged ({'; '.join(problems)})")
    return found


class Ranks:
    """Reads checkpoints with all ranks: each the files that a rank of its number wrote.

    Those are the files that it will load, unless the number of ranks has changed. `verify` and `fetch` are called on
    rank 0, in the function that `lead` is given; the other ranks follow.

    Args:
        group: A gloo group of all ranks; None for one process.
        remote: The object store, for `fetch`.
        attempt: Number of the attempt.
    """

    def __init__(self, group: Group | None, remote: RemoteStore | None = None, attempt: int = 0) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._group, self._remote, self._attempt = group, remote, attempt

    def lead(self, choose: Callable[[], Result]) -> Result:
        """Return on every rank what `choose` returns on rank 0. Collective."""
        if self.rank == 0:
            result = choose()
            self._send(("done", result))
            return result
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0, group=self._group)
            what, argument = message[0]
            if what == "done":
                return argument  # type: ignore[no-any-return]
            self._gathered(partial(self._verify if what == "verify" else self._fetch, argument))

    def verify(self, path: Path) -> list[str]:
        """Return the problems of a checkpoint folder."""
        self._send(("verify", path))
        # Another node may see an old directory (NFS), so that rank 0 looks for itself before it condemns a checkpoint.
        return commit.verify(path) if any(self._gathered(lambda: self._verify(path))) else []

    def fetch(self, name: str) -> list[str]:
        """Download a checkpoint into the run directory; returns its problems, with which it does not become visible."""
        assert self._remote is not None
        staging = self._remote.staging(name, self._attempt)
        try:
            self._send(("fetch", name))
            problems = self._gathered(lambda: self._fetch(name))
            failed = [one for one in problems if one.startswith(_FAILED)]
            if failed:
                raise EnvironmentFault(f"{name} could not be downloaded: {failed[0]}", "see the logs of the ranks")
            if not problems:
                self._remote.publish(name, staging)
        finally:
            staging.discard()
        return problems

    def _verify(self, path: Path) -> list[str]:
        return commit.verify(path, only=lambda file: commit.writer_of(file) % self._ranks == self.rank)

    def _fetch(self, name: str) -> list[str]:
        assert self._remote is not None
        local = self._remote.local
        return self._remote.download(
            name, Staging(local.directory / name, self._attempt, local.run), self.rank, self._ranks
        )

    def _send(self, message: tuple[str, Any]) -> None:
        if self._group is not None:
            dist.broadcast_object_list([message], src=0, group=self._group)

    def _gathered(self, find: Callable[[], list[str]]) -> list[str]:
        """Return on rank 0 what all ranks have found. An exception is a problem, too: no rank may wait for another."""
        try:
            found = find()
        except Exception as error:
            found = [f"{_FAILED} on rank {self.rank}: {type(error).__name__}: {error}"]
        if self._group is None:
            return found
        gathered: list[Any] = [None] * self._ranks
        dist.gather_object(found, gathered if self.rank == 0 else None, dst=0, group=self._group)
        return [problem for of_rank in gathered if of_rank for problem in of_rank]


_FAILED = "failed"
