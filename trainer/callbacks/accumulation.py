"""Rescales batch counters when accumulation changes on a mid-epoch resume: other world size, or other micro-batch.

A value that a callback has set for this epoch (GradientAccumulationScheduler) is restored: its hook at the start of the
epoch is not called on a resume in the middle of one.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Accumulation(Callback):
    """Adjusts Lightning's counts of micro-batches, which decide when to step and when the epoch ends."""

    def __init__(self, accumulate: int) -> None:
        self._accumulate = accumulate
        self._trainer: Trainer | None = None
        self._set_by_callback: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the Trainer for `state_dict`."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the configured accumulation, and the current one, which a callback may have changed."""
        now = self._accumulate if self._trainer is None else self._trainer.accumulate_grad_batches
        return {"accumulate": self._accumulate, "now": now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the accumulation that a callback had set, if any."""
        now = state_dict.get("now", state_dict["accumulate"])
        self._set_by_callback = None if now == state_dict["accumulate"] else now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the accumulation that a callback had set."""
        if self._set_by_callback is not None:
            trainer.accumulate_grad_batches, self._set_by_callback = self._set_by_callback, None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rescale the counters in the checkpoint."""
        before = checkpoint["callbacks"].get(self.state_key, {}).get("accumulate", self._accumulate)
        if before == self._accumulate:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            # The batch in which the checkpoint was saved is not completed yet: `completed` stays one less than `ready`.
            more = counts["ready"] * self._accumulate // before - counts["ready"]
            for name in counts:
                counts[name] += more
