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
        self.last: dict[str, float] = {}
        self._heartbeat = heartbeat

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self._heartbeat.update(best=self.best)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.last = {
            name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")
        }
        value = self.last.get(self.monitor)
        if value is not None and self._is_better(value):
            self.best = {
                "metric": self.monitor,
                "mode": self.mode,
                "value": value,
                "step": trainer.global_step,
            }
        self._heartbeat.update(best=self.best, validation=self.last)
        shown = "  ".join(f"{name} {number:.4f}" for name, number in sorted(self.last.items()))
        print(f"validation after step {trainer.global_step}: {shown}", flush=True)

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return value == value  # not NaN
        return value > self.best["value"] if self.mode == "max" else value < self.best["value"]
