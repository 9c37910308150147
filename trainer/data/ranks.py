"""What the ranks that read data know of each other's: whether it is the same, and whether there is more of it.

Only the data can tell whether a sampler or an iterable of the user's own already gives each rank its share: every rank
draws the order (or the first batch) with the same random numbers, and they compare.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy
import torch
import torch.distributed
from torch import Tensor

from trainer.core.errors import UserError

_log = logging.getLogger(__name__)
_MOST_BYTES = 1 << 20
"""Of a tensor that are looked at."""


class Shares(Enum):
    SAME = "every rank has the same"
    OWN = "each rank has its share already"


class Ranks:
    """This rank among those that read different data. Every method is collective: all ranks call it, in one order."""

    def __init__(self, rank: int, world_size: int, group: torch.distributed.ProcessGroup | None = None) -> None:
        """`group`: all ranks of the job, on the CPU; those that are tensor parallel have the same `rank` here."""
        self.rank, self.world_size, self.group = rank, world_size, group
        self._watch: torch.distributed.ProcessGroup | None = None

    def number(self) -> int:
        """This rank among all of the job."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    def count(self) -> int:
        """All ranks of the job."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def gather(self, value: Any) -> list[Any]:
        """`value` of each rank of the job, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def compare(self, value: Any, what: str) -> Shares:
        """Whether all ranks have the same. `what` names it in the UserError of tensor parallel ranks that differ."""
        if self.world_size == 1 and self.group is None:
            return Shares.SAME
        digests: dict[int, set[str]] = {}
        for rank, digest in self.gather((self.rank, digest_of(value))):
            digests.setdefault(rank, set()).add(digest)
        if any(len(found) > 1 for found in digests.values()):
            raise UserError(
                f"{what} gives other samples to each of the ranks that share one model by tensor parallel",
                "give the ranks of a tensor parallel group the same samples: leave the sampler out, and it is done",
            )
        different = len(set.union(*digests.values()))
        if 1 < different < len(digests) and self.rank == 0:
            _log.warning("%s: some of the ranks have the same samples: %d shares for %d", what, different, len(digests))
        return Shares.SAME if different == 1 else Shares.OWN

    def least(self, number: int | None) -> int | None:
        """The smallest of the ranks' numbers; None where one of them has none."""
        numbers = self.gather(number)
        return None if any(one is None for one in numbers) else min(numbers)

    def ask(self, has_more: bool) -> Question:
        """Start to ask whether all ranks have another batch; a step later the answer is there without a wait."""
        if self.group is None:
            return Question(torch.tensor(int(has_more)), None)
        if self._watch is None:  # of its own: other agreements may stand between the question and the answer
            self._watch = torch.distributed.new_group(backend="gloo")
        answer = torch.tensor(int(has_more))
        work = torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN, group=self._watch, async_op=True)
        return Question(answer, work)


class Question:
    """Whether every rank has another batch."""

    def __init__(self, answer: Tensor, work: Any) -> None:
        self._answer, self._work = answer, work

    def answer(self) -> bool:
        if self._work is not None:
            self._work.wait()
        return bool(self._answer)


def digest_of(value: Any) -> str:
    """Equal for equal nested collections of tensors, arrays and plain values; else for what pickles alike."""
    digest = hashlib.sha1(usedforsecurity=False)
    _digest(value, digest)
    return digest.hexdigest()


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        array = value.detach().flatten()[:_MOST_BYTES].cpu()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(array.contiguous().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    elif isinstance(value, numpy.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes()[:_MOST_BYTES] if value.dtype != object else repr(value.tolist()).encode())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(f"{key}:".encode())
            _digest(value[key], digest)
    elif isinstance(value, list) and value and type(value[0]) is int and all(type(one) is int for one in value):
        _digest(torch.tensor(value), digest)  # the order of a whole epoch
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _digest(one, digest)
    elif value is None or isinstance(value, (str, int, float, bool, bytes)):
        digest.update(f"{value!r};".encode())
    else:
        try:
            digest.update(pickle.dumps(value))
        except Exception:  # what cannot be pickled
            digest.update(f"{vars(value) if hasattr(value, '__dict__') else value!r}".encode())
