"""Lightning's EarlyStopping where the configuration names no metric."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from trainer.callbacks.best import LOSSES
from trainer.core.errors import UserError
from trainer.core.near import listed


class StopsByLoss(EarlyStopping):
    """EarlyStopping by the validation loss, under whichever of its usual names the first check finds it."""

    def __init__(self, name: str, **options: Any) -> None:
        """`name`: the callback's, in the section `callbacks`; `options`: EarlyStopping's others."""
        super().__init__("", **options)
        self._name = name

    @property
    def state_key(self) -> str:
        """Not with the metric, which is not known yet when a checkpoint is loaded."""
        return self._generate_state_key(monitor=None, mode=self.mode)

    def _validate_condition_metric(self, logs: dict[str, Tensor]) -> bool:
        """Raises UserError where none of the names was logged."""
        self.monitor = self.monitor or next((one for one in LOSSES if one in logs), "")
        if not self.monitor:
            raise UserError(
                f"callbacks.{self._name}.monitor is null, and no validation loss was logged, but {listed(logs)}",
                f"write callbacks.{self._name}.monitor=METRIC callbacks.{self._name}.mode=min (or max)",
            )
        return super()._validate_condition_metric(logs)
