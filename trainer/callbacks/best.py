"""Logs each validation, chooses the metric to monitor, and decides when to save a new best checkpoint.

Rank 0 decides by its own value; the other ranks follow its decision. The best is always a checkpoint: a value that was
not saved (`checkpoint.save_best=false`, or within `checkpoint.save_best_every_minutes`) does not count.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from trainer.checkpoint.store import CheckpointStore, best_of
from trainer.config.direction import direction_of, is_loss
from trainer.config.schema import CheckpointOptions
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed
from trainer.core.records import to_json
from trainer.runs.records import BestCheckpoint
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.steps import steps_taken

LOSSES = ("val/loss", "val_loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss")
"""Usual names of a validation loss."""
DEFAULTS = (*LOSSES, "loss")
"""Metrics to monitor, in this order, if neither the configuration nor the module names one."""


class BestMetric(Callback):
    """Keeps track of the best checkpoint: `best`, which is reported in the heartbeat and stored in checkpoints."""

    def __init__(
        self,
        options: CheckpointOptions,
        primary_metric: tuple[str, str] | None,
        store: CheckpointStore,
        heartbeat: Heartbeat,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        """Create the callback of an attempt.

        Args:
            options: The section `checkpoint`.
            primary_metric: The module's `primary_metric` as (name, mode); None: not defined.
            store: The run's checkpoints.
            heartbeat: The heartbeat of this rank.
            group: CPU (gloo) group of all ranks; None for one rank.
        """
        self.monitor: str | None = options.monitor
        self.mode: str | None = options.mode
        self.best: BestCheckpoint | None = None
        self._options = options
        self._primary = primary_metric
        self._store = store
        self._heartbeat = heartbeat
        self._group = group
        self._known = False
        """Whether `monitor` and `mode` are settled; None then means that nothing is monitored."""
        self._validated: list[str] = []
        """Names of the metrics that the last validation logged."""
        self._higher_is_better: dict[str, bool] = {}
        """Direction of metrics that were logged as torchmetrics objects, by name."""
        self._last: dict[str, float] = {}
        """Metrics of the last validation."""
        self._last_step = -1
        self._value: float | None = None
        self._saved_at = -math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the best checkpoint and the monitored metric."""
        return {
            "best": to_json(self.best) if self.best else None,
            "monitor": self.monitor,
            "mode": self.mode,
            "known": self._known,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the monitored metric and its direction, unless the configuration names others now."""
        if state_dict.get("known") and self._options.monitor in (None, state_dict["monitor"]):
            self.monitor, self._known = state_dict["monitor"], True
            self.mode = self._options.mode or state_dict["mode"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the best from the checkpoints on disk."""
        self.reread()

    def reread(self) -> None:
        """Read the best from the checkpoints on disk: one may have been lost, or could not be written."""
        self.best = None
        checkpoint = best_of(self._store.committed(), self.monitor, self.mode or "min")
        if checkpoint is not None:
            mode = checkpoint.mode or self.mode
            self.best = _best_checkpoint(checkpoint.monitor, mode, checkpoint.monitor_value, checkpoint.step)
        self._heartbeat.update(best=self.best)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep, report and print the metrics of the validation."""
        if trainer.sanity_checking:
            return
        self._last_step, self._value = steps_taken(trainer), None
        self._last = {
            name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")
        }
        results = trainer._results
        assert results is not None
        names = [name for item in results.values() for name in results._forked_name(item, on_step=False)]
        self._validated = [name for name in dict.fromkeys(names) if name in self._last]
        self._higher_is_better = {
            item.meta.name: bool(item.value.higher_is_better)
            for item in results.values()
            if isinstance(getattr(item, "value", None), Metric) and item.value.higher_is_better is not None
        }
        self._heartbeat.update(validation=self._last)
        shown = "  ".join(f"{name} {number:.4f}" for name, number in sorted(self._last.items()))
        if trainer.is_global_zero:
            print(f"validation after step {steps_taken(trainer)}: {shown}", flush=True)

    def decides_without_validation(self, trainer: Trainer) -> bool:
        """Return whether the end of an epoch decides: a metric is configured, and there is no validation to log it."""
        return self._options.monitor is not None and not trainer.enable_validation

    def decide(self, trainer: Trainer) -> bool:
        """Return whether to save the state after this validation (or epoch) as the best. Collective.

        Raises:
            UserError: On every rank, if the metric was not logged, or its direction is not known.
        """
        answer: list[Any] = [None]
        if trainer.is_global_zero:
            try:
                answer = [self._decide_on_rank_zero(trainer)]
            except UserError as error:
                answer = [error]
        if self._group is not None:
            torch.distributed.broadcast_object_list(answer, src=0, group=self._group)
        if isinstance(answer[0], UserError):
            raise answer[0]
        self.monitor, self.mode, self._known, self._value, saves = answer[0]
        return bool(saves)

    def saved(self, step: int) -> None:
        """Update the best: a checkpoint of this step is about to be written."""
        if step == self._last_step and self._is_better(self._value):
            self.best = _best_checkpoint(self.monitor, self.mode, self._value, step)
            self._saved_at = time.monotonic()
            self._heartbeat.update(best=self.best)

    def forget(self) -> None:
        """Forget the last validation: the weights have changed since."""
        self._last_step = -1

    def measured_at(self, step: int) -> dict[str, Any]:
        """Return the metrics for COMMIT of a checkpoint of this step; none unless this very step was validated."""
        if step != self._last_step:
            return {"metrics": {}, "monitor": self.monitor, "monitor_mode": self.mode, "monitor_value": None}
        return {
            "metrics": self._last,
            "monitor": self.monitor,
            "monitor_mode": self.mode,
            "monitor_value": self._value,
        }

    def _decide_on_rank_zero(self, trainer: Trainer) -> tuple[str | None, str | None, bool, float | None, bool]:
        """Return monitor, mode, whether they are settled, the value, and whether to save."""
        self._last_step = steps_taken(trainer)
        # Not `trainer.callback_metrics`, which reduces over the ranks again; these are complete at the end of an epoch.
        logged: dict[str, Any] = {**trainer._logger_connector._callback_metrics, **self._last}
        if not self._known:
            self._choose_metric(trainer, logged)
        value = logged.get(self.monitor or "")
        number = None if value is None else float(value)
        self._value = number if number is not None and math.isfinite(number) else None
        saves = self._options.save_best and self._options.keep_best > 0 and self._is_better(self._value)
        minutes = self._options.save_best_every_minutes
        if saves and minutes is not None and time.monotonic() - self._saved_at < 60 * minutes:
            print(f"  new best, not saved: checkpoint.save_best_every_minutes={minutes:g}", flush=True)
            saves = False
        return self.monitor, self.mode, self._known, self._value, saves

    def _is_better(self, value: float | None) -> bool:
        if value is None:
            return False
        if self.best is None or self.best.metric != self.monitor:
            return True
        return value > self.best.value if self.mode == "max" else value < self.best.value

    def _choose_metric(self, trainer: Trainer, logged: dict[str, Any]) -> None:
        """Settle the metric and its direction at the first validation."""
        named = self._options.monitor
        if named is not None and named not in logged:
            if _logged_by_training(trainer, named):
                return  # its value is known at the end of the epoch
            raise self._not_logged_error(named, logged)
        self.monitor = named or self._default()
        if self.monitor is None:
            print(
                f"no metric to choose the best checkpoint by; validation logged: {listed(self._validated)}. "
                "Set checkpoint.monitor=NAME and checkpoint.mode=min or max to keep the best",
                flush=True,
            )
        else:
            self.mode = self._direction(self.monitor)
            if self.mode is None:
                raise UserError(
                    f"checkpoint.monitor={self.monitor}: it is not known whether higher or lower is better",
                    "write checkpoint.mode=min or checkpoint.mode=max",
                )
        self._known = True

    def _default(self) -> str | None:
        """Return the default metric: `primary_metric`, a validation loss, or any metric whose direction is known."""
        if self._primary is not None:
            if self._primary[0] in self._validated:
                return self._primary[0]
            print(
                f"primary_metric {self._primary[0]!r} was not logged by the validation, which logged: "
                f"{listed(self._validated)}",
                flush=True,
            )
        # With several loaders, `val_loss/dataloader_idx_0` is the first loader's.
        plain = {name.removesuffix("/dataloader_idx_0"): name for name in reversed(self._validated)}
        known = [name for name in self._validated if self._direction(name) is not None]
        losses = [name for name in known if is_loss(name)]
        candidates = [plain[name] for name in DEFAULTS if name in plain] + losses + known
        return candidates[0] if candidates else None

    def _direction(self, name: str) -> str | None:
        """Return `min` or `max`: configured, from the module or torchmetrics' `higher_is_better`, or by name."""
        if self._options.mode is not None:
            return self._options.mode
        if self._primary is not None and name == self._primary[0]:
            return self._primary[1]
        bare = name.partition("/dataloader_idx_")[0]
        if bare in self._higher_is_better:
            return "max" if self._higher_is_better[bare] else "min"
        return direction_of(name)

    def _not_logged_error(self, name: str, logged: dict[str, Any]) -> UserError:
        when = "the first validation" if self._validated else "the first epoch"
        what = f"it logged {listed(logged)}" if logged else "nothing was logged: call self.log(...) in validation_step"
        hint = did_you_mean(name, logged, prefix="checkpoint.monitor=")
        return UserError(
            f"checkpoint.monitor={name}: {when} did not log it; {what}",
            f"{hint}write checkpoint.monitor=NAME with a metric that is logged, or leave it out",
        )


def _best_checkpoint(metric: str | None, mode: str | None, value: float | None, step: int) -> BestCheckpoint:
    assert value is not None
    return BestCheckpoint(metric=metric, mode="max" if mode == "max" else "min", value=value, step=step)


def primary_metric_of(module: LightningModule) -> tuple[str, str] | None:
    """Return the module's attribute `primary_metric` if it is a pair of a name and `min` or `max`."""
    metric = getattr(module, "primary_metric", None)
    if isinstance(metric, (tuple, list)) and len(metric) == 2 and metric[1] in ("min", "max"):
        return str(metric[0]), str(metric[1])
    return None


def _logged_by_training(trainer: Trainer, name: str) -> bool:
    """Return whether a training hook logs this name: its value for the epoch is known at the end of the epoch."""
    return any(
        name in (item.meta.name, item.meta.forked_name(on_step=False))
        for item in trainer.fit_loop.epoch_loop._results.values()
    )
