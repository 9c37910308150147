"""The checkpoint from which an attempt starts: rank 0 chooses, all ranks verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.checkpoint import commit, tiers
from trainer.checkpoint.store import Checkpoint, Verify
from trainer.core.errors import UserError
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

    Rank 0 chooses, so that all load the same step.
    """

    def newest(verify: Verify) -> Checkpoint | UserError | None:
        starts = [(event.time, event.step) for event in attempt.directory.events_of(events.Started)]
        found, skipped = tiers.newest_good(stores.run, stores.local, starts, verify)
        for message in skipped:
            print(f"checkpoint skipped: {message}", flush=True)
            attempt.directory.add_event(events.CheckpointSkipped(reason=message))
        return UserError(*_NO_GOOD_CHECKPOINT) if skipped and found is None else found

    chosen = with_shared_verification(newest, group)
    if isinstance(chosen, UserError):
        raise chosen
    return chosen


def with_shared_verification(call: Callable[[Verify], Result], group: Group | None) -> Result:
    """Return on every rank what `call` returns on rank 0. Collective.

    Args:
        call: Called on rank 0 with a function that verifies a checkpoint, for which each rank reads the files that a
            rank of its number has written: those that it will load, unless the number of ranks has changed.
        group: A gloo group of all ranks; None for one process.
    """
    if group is None:
        return call(commit.verify)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def verify_share(path: Path) -> list[str]:
        """Return the problems that all ranks have found; the sizes are compared by rank 0 alone."""
        try:
            found = commit.verify(path, only=lambda file: commit.writer_of(file) % ranks == rank)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        gathered: list[Any] = [None] * ranks
        dist.gather_object(found, gathered if rank == 0 else None, dst=0, group=group)
        return [problem for of_rank in gathered if of_rank for problem in of_rank]

    def verify(path: Path) -> list[str]:
        dist.broadcast_object_list([path, None], src=0, group=group)
        # Another node may see an old directory (NFS), so that rank 0 looks for itself before it condemns a checkpoint.
        return commit.verify(path) if verify_share(path) else []

    if rank == 0:
        result = call(verify)
        dist.broadcast_object_list([None, result], src=0, group=group)
        return result
    while True:
        message: list[Any] = [None, None]
        dist.broadcast_object_list(message, src=0, group=group)
        if message[0] is None:
            return message[1]  # type: ignore[no-any-return]
        verify_share(message[0])
