"""Agreement of the ranks on their data: whether it is the same, and whether every rank has another batch.

Only the data can tell whether a custom sampler or iterable already gives each rank its share: every rank draws the
order (or the first batch) with the same random numbers, and they compare.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy
import torch
import torch.distributed
from torch import Tensor

from trainer.core.errors import UserError
from trainer.runtime import cpu_groups

_log = logging.getLogger(__name__)
_MAX_HASHED = 1 << 20
"""Maximum part of a value that is hashed: elements of a tensor, bytes of a NumPy array."""


class Shares(Enum):
    """Result of comparing what the ranks have."""

    SAME = "every rank has the same"
    OWN = "each rank has its share already"


class Ranks:
    """This rank's position among the data-parallel ranks.

    Every method is collective: all ranks call it, in the same order.

    Args:
        rank: Data-parallel rank; the ranks of one tensor parallel group share it.
        world_size: Number of data-parallel ranks, which read different data.
        group: CPU process group of all ranks of the job; None: one process.
    """

    def __init__(self, rank: int, world_size: int, group: torch.distributed.ProcessGroup | None = None) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group
        self._watch: torch.distributed.ProcessGroup | None = None

    def global_rank(self) -> int:
        """Return the rank of this process among all ranks of the job."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    def global_size(self) -> int:
        """Return the number of ranks of the job."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of each rank of the job, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def compare(self, value: Any, what: str) -> Shares:
        """Return whether all ranks have the same `value`.

        Args:
            value: What is compared.
            what: Its name in messages.

        Raises:
            UserError: The ranks of a tensor parallel group differ.
        """
        if self.world_size == 1 and self.group is None:
            return Shares.SAME
        digests: dict[int, set[str]] = {}
        for rank, digest in self.gather((self.rank, digest_of(value))):
            digests.setdefault(rank, set()).add(digest)
        if any(len(rank_digests) > 1 for rank_digests in digests.values()):
            raise UserError(
                f"{what} gives different samples to the ranks of a tensor parallel group",
                "give the ranks of a tensor parallel group the same samples, or remove the custom sampler",
            )
        num_distinct = len(set.union(*digests.values()))
        if 1 < num_distinct < len(digests) and self.rank == 0:
            _log.warning(
                "%s: some ranks have the same samples: %d shares for %d ranks", what, num_distinct, len(digests)
            )
        return Shares.SAME if num_distinct == 1 else Shares.OWN

    def minimum(self, number: int | None) -> int | None:
        """Return the smallest `number` of all ranks; None if any rank has none."""
        numbers = self.gather(number)
        return None if any(value is None for value in numbers) else min(numbers)

    def start_check(self, has_more: bool) -> PendingCheck:
        """Start an asynchronous check that all ranks have another batch; its result is usually ready one step later."""
        if self.group is None:
            return PendingCheck(torch.tensor(int(has_more)), None)
        if (
            self._watch is None
        ):  # a separate group: other collectives may come between the start of the check and its result
            self._watch = cpu_groups.new_group(with_tree=True)
        result = torch.tensor(int(has_more))
        return PendingCheck(result, cpu_groups.start_all_reduce(result, torch.distributed.ReduceOp.MIN, self._watch))


class PendingCheck:
    """A pending check that every rank has another batch."""

    def __init__(self, result: Tensor, wait: Callable[[], object] | None) -> None:
        self._result, self._wait = result, wait

    def result(self) -> bool:
        """Wait for the result, and return whether every rank has another batch."""
        if self._wait is not None:
            self._wait()
        return bool(self._result)


def digest_of(value: Any) -> str:
    """Return a digest that is equal for equal nested collections of tensors, arrays and plain values.

    Other objects are compared by their pickles.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    _digest(value, digest)
    return digest.hexdigest()


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        array = value.detach().flatten()[:_MAX_HASHED].cpu()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(array.contiguous().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    elif isinstance(value, numpy.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes()[:_MAX_HASHED] if value.dtype != object else repr(value.tolist()).encode())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(f"{key}:".encode())
            _digest(value[key], digest)
    elif isinstance(value, list) and value and type(value[0]) is int and all(type(one) is int for one in value):
        _digest(torch.tensor(value), digest)  # may be the order of a whole epoch
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _digest(one, digest)
    elif value is None or isinstance(value, (str, int, float, bool, bytes)):
        digest.update(f"{value!r};".encode())
    else:
        try:
            digest.update(pickle.dumps(value))
        except Exception:  # not picklable
            digest.update(f"{vars(value) if hasattr(value, '__dict__') else value!r}".encode())
