"""Says each validation in the log and remembers the best one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.worker.heartbeat import Heartbeat


class BestMetric(Callback):
    """`best` is {"metric", "mode", "value", "step"} of the monitored metric; in the heartbeat and in checkpoints."""

    def __init__(self, monitor: str, mode: str, heartbeat: Heartbeat) -> None:
        self.monitor = monitor
        self.mode = mode
        self.best: dict[str, Any] | None = None
        self._last: dict[str, float] = {}
        self._last_step = -1
        self._heartbeat = heartbeat

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self._heartbeat.update(best=self.best)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._last_step = trainer.global_step
        self._last = {
            name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")
        }
        value = self._last.get(self.monitor)
        if value is not None and self._is_better(value):
            self.best = {
                "metric": self.monitor,
                "mode": self.mode,
                "value": value,
                "step": trainer.global_step,
            }
        self._heartbeat.update(best=self.best, validation=self._last)
        shown = "  ".join(f"{name} {number:.4f}" for name, number in sorted(self._last.items()))
        if trainer.is_global_zero:
            print(f"validation after step {trainer.global_step}: {shown}", flush=True)

    def measured_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this step says of its quality: nothing unless it was validated after this very step."""
        measured = self._last if step == self._last_step else {}
        return {"metrics": measured, "monitor": self.monitor, "monitor_value": measured.get(self.monitor)}

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return value == value  # not NaN
        return value > self.best["value"] if self.mode == "max" else value < self.best["value"]
