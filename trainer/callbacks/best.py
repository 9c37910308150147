"""Logs each validation, finds the metric that says which checkpoint is best, and decides when a new best is saved.

The first rank decides, by its own value; the others take its answer. What is best is always a checkpoint: a value that
was not saved (`checkpoint.save_best=false`, or within `checkpoint.save_best_every_minutes`) is not called best.
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
"""Names of a validation loss."""
DEFAULTS = (*LOSSES, "loss")
"""Looked for, in this order, where neither the configuration nor the module names a metric."""


class BestMetric(Callback):
    """`best` is the best checkpoint; in the heartbeat and in checkpoints."""

    def __init__(
        self,
        options: CheckpointOptions,
        primary_metric: tuple[str, str] | None,
        store: CheckpointStore,
        heartbeat: Heartbeat,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        """`primary_metric`: the module's own (name, mode). `group` is the CPU (gloo) group; None for one rank."""
        self.monitor: str | None = options.monitor
        self.mode: str | None = options.mode
        self.best: BestCheckpoint | None = None
        self._options = options
        self._primary = primary_metric
        self._store = store
        self._heartbeat = heartbeat
        self._group = group
        self._known = False
        """Whether `monitor` and `mode` have been found; None then means that nothing is monitored."""
        self._validated: list[str] = []
        """Names that the last validation logged."""
        self._higher_is_better: dict[str, bool] = {}
        """Of those that were logged as torchmetrics objects."""
        self._last: dict[str, float] = {}
        self._last_step = -1
        self._value: float | None = None
        self._saved_at = -math.inf

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": to_json(self.best) if self.best else None,
            "monitor": self.monitor,
            "mode": self.mode,
            "known": self._known,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("known") and self._options.monitor is None:
            self.monitor, self.mode, self._known = state_dict["monitor"], state_dict["mode"], True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reread()

    def reread(self) -> None:
        """Take the best from the checkpoints on disk: one may have been lost, or could not be written."""
        self.best = None
        found = best_of(self._store.committed(), self.monitor, self.mode or "min")
        if found is not None:
            mode = found.mode or self.mode
            self.best = _best_checkpoint(found.monitor, mode, found.monitor_value, found.step)
        self._heartbeat.update(best=self.best)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        """Whether the end of an epoch is looked at: a metric is named, and there is no validation to log it."""
        return self._options.monitor is not None and not trainer.enable_validation

    def decide(self, trainer: Trainer) -> bool:
        """Whether the state after this validation (or epoch) is to be saved as the best. Collective.

        Raises UserError on every rank where the metric was not logged, or its direction is not known.
        """
        answer: list[Any] = [None]
        if trainer.is_global_zero:
            try:
                answer = [self._judge(trainer)]
            except UserError as error:
                answer = [error]
        if self._group is not None:
            torch.distributed.broadcast_object_list(answer, src=0, group=self._group)
        if isinstance(answer[0], UserError):
            raise answer[0]
        self.monitor, self.mode, self._known, self._value, saves = answer[0]
        return bool(saves)

    def saved(self, step: int) -> None:
        """A checkpoint of this step is about to be written: it may be the best."""
        if step == self._last_step and self._is_better(self._value):
            self.best = _best_checkpoint(self.monitor, self.mode, self._value, step)
            self._saved_at = time.monotonic()
            self._heartbeat.update(best=self.best)

    def forget(self) -> None:
        """What was validated are not the weights any more."""
        self._last_step = -1

    def measured_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this step says of its quality: nothing unless it was validated after this very step."""
        if step != self._last_step:
            return {"metrics": {}, "monitor": self.monitor, "monitor_mode": self.mode, "monitor_value": None}
        return {
            "metrics": self._last,
            "monitor": self.monitor,
            "monitor_mode": self.mode,
            "monitor_value": self._value,
        }

    def _judge(self, trainer: Trainer) -> tuple[str | None, str | None, bool, float | None, bool]:
        self._last_step = steps_taken(trainer)
        # Not `trainer.callback_metrics`, which reduces over the ranks anew; these are complete at the end of an epoch.
        logged: dict[str, Any] = {**trainer._logger_connector._callback_metrics, **self._last}
        if not self._known:
            self._find(trainer, logged)
        value = logged.get(self.monitor or "")
        number = None if value is None else float(value)
        self._value = number if number is not None and math.isfinite(number) else None
        saves = self._options.save_best and self._options.keep_best > 0 and self._is_better(self._value)
        minutes = self._options.save_best_every_minutes
        if saves and minutes is not None and time.monotonic() - self._saved_at < 60 * minutes:
            print(f"  better, and not saved: checkpoint.save_best_every_minutes={minutes:g}", flush=True)
            saves = False
        return self.monitor, self.mode, self._known, self._value, saves

    def _is_better(self, value: float | None) -> bool:
        if value is None:
            return False
        if self.best is None or self.best.metric != self.monitor:
            return True
        return value > self.best.value if self.mode == "max" else value < self.best.value

    def _find(self, trainer: Trainer, logged: dict[str, Any]) -> None:
        """Settle the metric and its direction, at the first validation."""
        named = self._options.monitor
        if named is not None and named not in logged:
            if _logged_by_training(trainer, named):
                return  # at the end of the epoch
            raise self._not_logged(named, logged)
        self.monitor = named or self._default()
        if self.monitor is None:
            print(
                f"no metric says which checkpoint is best; validation logged: {listed(self._validated)}. "
                "Set checkpoint.monitor=NAME and checkpoint.mode=min or max to keep the best",
                flush=True,
            )
        else:
            self.mode = self._direction(self.monitor)
            if self.mode is None:
                raise UserError(
                    f"checkpoint.monitor={self.monitor}: its name does not say whether more or less of it is better",
                    "write checkpoint.mode=min or checkpoint.mode=max",
                )
        self._known = True

    def _default(self) -> str | None:
        """The module's own metric, a loss of the validation, or else a metric that has a direction."""
        if self._primary is not None:
            if self._primary[0] in self._validated:
                return self._primary[0]
            print(
                f"primary_metric {self._primary[0]!r} was not logged by the validation, which logged: "
                f"{listed(self._validated)}",
                flush=True,
            )
        # Several loaders: `val_loss/dataloader_idx_0` is the first one's.
        plain = {name.removesuffix("/dataloader_idx_0"): name for name in reversed(self._validated)}
        known = [name for name in self._validated if self._direction(name) is not None]
        losses = [name for name in known if is_loss(name)]
        candidates = [plain[name] for name in DEFAULTS if name in plain] + losses + known
        return candidates[0] if candidates else None

    def _direction(self, name: str) -> str | None:
        """The configured one, the module's, torchmetrics' `higher_is_better`, the name's common meaning."""
        if self._options.mode is not None:
            return self._options.mode
        if self._primary is not None and name == self._primary[0]:
            return self._primary[1]
        bare = name.partition("/dataloader_idx_")[0]
        if bare in self._higher_is_better:
            return "max" if self._higher_is_better[bare] else "min"
        return direction_of(name)

    def _not_logged(self, name: str, logged: dict[str, Any]) -> UserError:
        when = "the first validation" if self._validated else "the first epoch"
        what = f"it logged {listed(logged)}" if logged else "nothing was logged: call self.log(...) in validation_step"
        hint = did_you_mean(name, logged, prefix="checkpoint.monitor=")
        return UserError(
            f"checkpoint.monitor={name}: {when} did not log it; {what}",
            f"{hint}write checkpoint.monitor=NAME with one that is logged, or leave it out",
        )


def _best_checkpoint(metric: str | None, mode: str | None, value: float | None, step: int) -> BestCheckpoint:
    assert value is not None
    return BestCheckpoint(metric=metric, mode="max" if mode == "max" else "min", value=value, step=step)


def primary_metric_of(module: LightningModule) -> tuple[str, str] | None:
    """The module's attribute `primary_metric`, where it is a pair of a name and min or max."""
    found = getattr(module, "primary_metric", None)
    if isinstance(found, (tuple, list)) and len(found) == 2 and found[1] in ("min", "max"):
        return str(found[0]), str(found[1])
    return None


def _logged_by_training(trainer: Trainer, name: str) -> bool:
    """Whether a training hook logs this name: its value for the epoch is there at the epoch's end."""
    return any(
        name in (item.meta.name, item.meta.forked_name(on_step=False))
        for item in trainer.fit_loop.epoch_loop._results.values()
    )
