"""Saves the random number generator states of every rank in the checkpoint; Lightning saves none."""

from __future__ import annotations

from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runtime import cpu_groups, rng
from trainer.runtime.steps import steps_taken


class RngState(Callback):
    """Saves and restores the generators of Python, NumPy and torch.

    At another world size a bit-for-bit resume is impossible: each rank is seeded from (seed, rank, step) instead.
    """

    def __init__(self, seed: int, rank: int, data_rank: int, group: torch.distributed.ProcessGroup | None) -> None:
        """Create the callback of a rank.

        Args:
            seed: The run's seed.
            rank: Global rank.
            data_rank: Data parallel rank. Tensor parallel ranks of one group share it, and so draw the same dropout.
            group: CPU (gloo) group of all ranks; None for one rank.
        """
        self._seed = seed
        self._rank = rank
        self._data_rank = data_rank
        self._group = group
        self._saved: list[dict[str, Any]] | None = None
        self._mine: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Gather the states of all ranks. Collective: Lightning calls this on every rank, and only the first writes."""
        return {"ranks": cpu_groups.gather(rng.state(), self._group)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states for `on_train_start`."""
        self._saved = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the generators right before the first batch: building and loading drew numbers, too."""
        if self._saved is None:
            rng.seed_all(rng.seed_of_rank(self._seed, self._data_rank))
        elif len(self._saved) == trainer.world_size:
            rng.restore(self._saved[self._rank])
            self._mine = self._saved[self._rank]
        else:
            rng.seed_all(rng.seed_of_rank(self._seed + steps_taken(trainer), self._data_rank))
        self._saved = None

    def restore_again(self) -> None:
        """Restore once more after hooks that draw numbers in `on_train_start`.

        The previous attempt drew those numbers before the checkpoint.
        """
        if self._mine is not None:
            rng.restore(self._mine)
            self._mine = None
