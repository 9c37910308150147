"""Goes on in mid-epoch with another number of micro-batches a step: another world size, or half the micro-batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Accumulation(Callback):
    """Lightning counts micro-batches, and from its count decides when a step is full and when the epoch is over."""

    def __init__(self, accumulate: int) -> None:
        self._accumulate = accumulate

    def state_dict(self) -> dict[str, Any]:
        return {"accumulate": self._accumulate}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        before = checkpoint["callbacks"].get(self.state_key, {}).get("accumulate", self._accumulate)
        if before == self._accumulate:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            # The batch in which the checkpoint was saved is not completed yet: one less than the others, as before.
            more = counts["ready"] * self._accumulate // before - counts["ready"]
            for name in counts:
                counts[name] += more
