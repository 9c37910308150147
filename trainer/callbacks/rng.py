"""Saves the random number generators of every rank in the checkpoint; Lightning saves none."""

from __future__ import annotations

from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runtime import rng
from trainer.runtime.steps import steps_taken


class RngState(Callback):
    """At another world size each rank starts from a seed made of (seed, rank, step) instead: nothing could be equal.

    `group` is the CPU (gloo) group; None for one rank.
    """

    def __init__(self, seed: int, rank: int, data_rank: int, group: torch.distributed.ProcessGroup | None) -> None:
        """`data_rank`: ranks that share layers and samples (tensor parallel) have the same, and so the same dropout."""
        self._seed = seed
        self._rank = rank
        self._data_rank = data_rank
        self._group = group
        self._saved: list[dict[str, Any]] | None = None
        self._mine: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Lightning calls this on every rank, so the ranks can gather here; only the first writes."""
        states: list[Any] = [rng.state()]
        if self._group is not None:
            mine = states[0]
            states = [None] * torch.distributed.get_world_size(self._group)
            torch.distributed.all_gather_object(states, mine, group=self._group)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last moment before the first batch: building and restoring drew numbers, too."""
        if self._saved is None:
            rng.seed_all(rng.seed_of_rank(self._seed, self._data_rank))
        elif len(self._saved) == trainer.world_size:
            rng.restore(self._saved[self._rank])
            self._mine = self._saved[self._rank]
        else:
            rng.seed_all(rng.seed_of_rank(self._seed + steps_taken(trainer), self._data_rank))
        self._saved = None

    def restore_again(self) -> None:
        """After what draws numbers in `on_train_start`: the attempt before drew them before the checkpoint."""
        if self._mine is not None:
            rng.restore(self._mine)
            self._mine = None
