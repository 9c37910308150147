"""EarlyStopping for a configuration that names no metric."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from trainer.callbacks.best import LOSSES
from trainer.core.errors import UserError
from trainer.core.near import listed


class LossEarlyStopping(EarlyStopping):
    """Lightning's EarlyStopping on the validation loss, under the first of its usual names that is logged."""

    def __init__(self, name: str, **options: Any) -> None:
        """Create the callback.

        Args:
            name: Name of the callback in the section `callbacks`.
            options: Other arguments of EarlyStopping.
        """
        super().__init__("", **options)
        self._name = name

    @property
    def state_key(self) -> str:
        """Key in checkpoints. It leaves out the metric, which is not known yet when a checkpoint is loaded."""
        # The name of this class in earlier versions, so that their checkpoints load.
        return f"StopsByLoss{dict(monitor=None, mode=self.mode)!r}"

    def _validate_condition_metric(self, logs: dict[str, Tensor]) -> bool:
        """Find the metric at the first check. Raises UserError if no validation loss was logged."""
        self.monitor = self.monitor or next((name for name in LOSSES if name in logs), "")
        if not self.monitor:
            raise UserError(
                f"callbacks.{self._name}.monitor is null, and no validation loss was logged, only {listed(logs)}",
                f"write callbacks.{self._name}.monitor=METRIC callbacks.{self._name}.mode=min (or max)",
            )
        return super()._validate_condition_metric(logs)
