"""The checkpoint from which an attempt starts: rank 0 chooses, all ranks verify and download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from trainer.train.checkpoint_contents import Stores
from trainer.train.node_checkpoints import NodeCheckpoints

Result = TypeVar("Result")
_NO_GOOD_CHECKPOINT = (
    "every checkpoint of this run is damaged; starting again from step 0 would hide that",
    "the damaged ones are kept as checkpoints/bad-*; start a new run, or restore one from a backup",
)


def choose(attempt: Attempt, stores: Stores, group: Group | None, strategy: str) -> Checkpoint | None:
    """Return the newest good checkpoint; None: start from step 0. Collective.

    Rank 0 chooses, so that all load the same step. One that is only in the object store is downloaded into the run
    directory, and one that is only there is uploaded.

    Args:
        attempt: This attempt.
        stores: Where checkpoints are.
        group: A gloo group of all ranks; None for one process.
        strategy: Name of the strategy of this attempt.
    """
    remote = stores.uploads.remote if stores.uploads is not None else None
    nodes = None
    if stores.local is not None and stores.disk is not None and group is not None:
        nodes = NodeCheckpoints(stores.local, stores.disk, strategy, attempt, group)
        nodes.compare()
    ranks = Ranks(group, remote, attempt.rank.attempt, nodes)

    def newest() -> Checkpoint | UserError | None:
        starts = [(event.time, event.step) for event in attempt.directory.events_of(events.Started)]
        found, skipped = tiers.newest_good(stores.run, stores.local if nodes is None else None, starts, ranks.verify)
        if nodes is not None:
            found = _newer_on_nodes(nodes, found, skipped, starts, ranks)
        if remote is not None:
            found = _newer_one(remote, found, skipped, ranks)
        for message in skipped:
            print(f"checkpoint skipped: {message}", flush=True)
            attempt.directory.add_event(events.CheckpointSkipped(reason=message))
        return UserError(*_NO_GOOD_CHECKPOINT) if skipped and found is None else found

    chosen = ranks.lead(newest)
    if isinstance(chosen, UserError):
        raise chosen
    if nodes is not None:
        nodes.remove_newer(chosen.step if chosen else 0)
        nodes.record(stores.run.directory)
        if chosen is not None and nodes.disk.is_of_tier(chosen.path):
            chosen = replace(chosen, path=nodes.disk.here(chosen.path))
    elif stores.local is not None and ranks.rank == 0:
        stores.local.remove_newer(chosen.step if chosen else 0)  # superseded: their steps are trained again
    if stores.uploads is not None and ranks.rank == 0:
        remote = stores.uploads.remote
        remote.clean_leftovers()
        held = remote.committed()
        remote.record(held)
        for one in stores.run.committed():
            if one.path not in [other.path for other in held]:
                stores.uploads.submit(one.path, alone=True)
    return chosen


def _newer_on_nodes(
    nodes: NodeCheckpoints,
    found: Checkpoint | None,
    skipped: list[str],
    starts: list[tuple[float, int]],
    ranks: Ranks,
) -> Checkpoint | None:
    """Return the newest good checkpoint on the disks of the nodes, if it is newer than `found`."""
    for candidate in nodes.newer(starts, found.step if found else 0):
        problems = ranks.verify_parts(candidate) or ranks.share_parts(candidate)
        if not problems:
            return candidate
        skipped.append(f"local {candidate.path.name} is damaged ({'; '.join(problems)})")
    return found


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
        nodes: The checkpoints on the disks of several nodes, for `verify_parts` and `share_parts`.
    """

    def __init__(
        self,
        group: Group | None,
        remote: RemoteStore | None = None,
        attempt: int = 0,
        nodes: NodeCheckpoints | None = None,
    ) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        self._nodes = nodes
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
            self._gathered(partial(self._steps[what], argument))

    def verify(self, path: Path) -> list[str]:
        """Return the problems of a checkpoint folder."""
        self._send(("verify", path))
        # Another node may see an old directory (NFS), so that rank 0 looks for itself before it condemns a checkpoint.
        return commit.verify(path) if any(self._gathered(lambda: self._verify(path))) else []

    def verify_parts(self, checkpoint: Checkpoint) -> list[str]:
        """Return the problems of a checkpoint on the disks of several nodes."""
        return self._on_all("verify parts", checkpoint)

    def share_parts(self, checkpoint: Checkpoint) -> list[str]:
        """Send what rank 0 wrote of a checkpoint to the other nodes; returns the problems."""
        return self._on_all("share parts", checkpoint)

    def _on_all(self, what: str, checkpoint: Checkpoint) -> list[str]:
        argument = (checkpoint.path.name, checkpoint.layout)
        self._send((what, argument))
        return self._gathered(partial(self._steps[what], argument))

    @property
    def _steps(self) -> dict[str, Callable[[Any], list[str]]]:
        steps: dict[str, Callable[[Any], list[str]]] = {"verify": self._verify, "fetch": self._fetch}
        if (nodes := self._nodes) is not None:
            steps["verify parts"] = lambda argument: nodes.verify(*argument)
            steps["share parts"] = lambda argument: nodes.share(*argument)
        return steps

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
