"""Saves state that Lightning keeps only in memory, and that an exact mid-epoch resume needs.

- the metrics logged so far: `trainer.callback_metrics`, which schedulers and early stopping read, and the sums behind
  `self.log(..., on_epoch=True)`;
- the states of torchmetrics objects, which are not in a state dict, on each rank;
- buffers with `persistent=False` that have changed since training started;
- which parameters are frozen: callbacks freeze and unfreeze them at the start of an epoch;
- gradients, if the module optimizes manually: it may be accumulating them.

Python attributes of modules and callbacks are not included: they belong in `on_save_checkpoint` or `state_dict`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from trainer.runtime import cpu_groups


class TransientState(Callback):
    """Saves the state of every rank; each rank restores its own.

    At another world size, only the state that all ranks share is restored. `group` is the CPU (gloo) group of all
    ranks; None for one rank.
    """

    state_key = "InMemory"
    """Key in checkpoints: the name of this class in earlier versions."""

    def __init__(self, rank: int, group: torch.distributed.ProcessGroup | None) -> None:
        self._rank = rank
        self._group = group
        self._trainer: Trainer | None = None
        self._buffers: dict[str, tuple[Tensor, int]] = {}
        """Non-persistent buffers at the start of training: name to tensor and version."""
        self._changed: set[str] = set()
        """Names of non-persistent buffers that an earlier attempt had changed."""
        self._saved: dict[str, Any] | None = None
        self._not_logged_again: dict[str, dict[str, Any]] = {}
        """Restored sums of `self.log` whose keys this attempt has not logged yet in the epoch of the checkpoint."""
        self._restored: dict[str, Any] | None = None
        """State that was restored in `on_train_start`, until all of those hooks have run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the Trainer for `state_dict`."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Gather the states of all ranks. Collective: Lightning calls this on every rank, and only the first writes."""
        trainer = self._trainer
        if trainer is None:
            return {}
        module = trainer.lightning_module
        mine = {
            "results": _results(trainer),
            "metrics": _metric_states(module),
            "buffers": {name: _buffer(module, name) for name in self._changed_buffers(module)},
        }
        logged = trainer._logger_connector._callback_metrics
        return {
            "ranks": cpu_groups.gather(mine, self._group),
            "callback_metrics": {name: torch.as_tensor(value).detach().cpu() for name, value in logged.items()},
            "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
            "gradients": {} if module.automatic_optimization else _gradients(module),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for `on_train_start`."""
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state of the checkpoint."""
        saved, self._saved = self._saved, None
        self._buffers = {
            name: (buffer, _version(buffer))
            for name, buffer in pl_module.named_buffers()
            if not _is_persistent(pl_module, name)
        }
        if not saved:
            return
        if len(saved["ranks"]) == trainer.world_size:
            self._not_logged_again = _move_to(saved["ranks"][self._rank]["results"], pl_module.device)
            _restore_results(trainer, self._not_logged_again)
        self._restored = saved
        self._restore(trainer, pl_module, saved)

    def restore_again(self) -> None:
        """Restore once more after every `on_train_start`: a hook that resets a metric did so before the checkpoint."""
        saved, self._restored = self._restored, None
        if saved is not None and self._trainer is not None:
            self._restore(self._trainer, self._trainer.lightning_module, saved)

    def _restore(self, trainer: Trainer, pl_module: LightningModule, saved: dict[str, Any]) -> None:
        device = pl_module.device
        trainer._logger_connector._callback_metrics.update(_move_to(saved["callback_metrics"], device))
        frozen = set(saved["frozen"])
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad == (name in frozen):
                parameter.requires_grad = name not in frozen
            if name in saved["gradients"]:
                parameter.grad = saved["gradients"][name].to(parameter)
        if len(saved["ranks"]) == trainer.world_size:
            mine = saved["ranks"][self._rank]
            _restore_metrics(pl_module, mine["metrics"])
            for name, value in mine["buffers"].items():
                self._changed.add(name)
                _buffer(pl_module, name).copy_(value)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard restored sums: their epoch is over."""
        self._not_logged_again = {}
        vars(trainer.fit_loop.epoch_loop._results).pop("update_metrics", None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what was logged only before the checkpoint, such as in `on_train_epoch_start` or for the first batch."""
        for key, saved in self._not_logged_again.items():
            if "meta" in saved:  # not in checkpoints of 0.1
                trainer.fit_loop.epoch_loop._results[key] = _as_logged(saved, trainer)
        self._not_logged_again = {}

    def _changed_buffers(self, module: LightningModule) -> list[str]:
        """Return the names of buffers that were reassigned or written in place; writes through `.data` are not seen."""
        changed = []
        for name, buffer in module.named_buffers():
            before = self._buffers.get(name)
            same = before is not None and before[0] is buffer and before[1] == _version(buffer)
            if not _is_persistent(module, name) and (name in self._changed or not same):
                changed.append(name)
        return changed


def _results(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return the sums of `self.log` in this epoch, by key of Lightning's result collection."""
    saved = {}
    for key, item in trainer.fit_loop.epoch_loop._results.items():
        if item.has_reset or not item.is_tensor:
            continue
        sums = {name: getattr(item, name).detach().cpu().clone() for name in item._defaults}
        saved[key] = {"sums": sums, "updates": item._update_count}
        if item.meta.on_epoch:
            saved[key]["meta"] = {name: getattr(item.meta, name) for name in _META}
            saved[key]["meta"]["reduce_fx"] = item.meta.reduce_fx.__name__
            saved[key]["sync"] = {"_should": item.meta.sync.should, "rank_zero_only": item.meta.sync.rank_zero_only}
    return saved


_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
"""Arguments of `self.log` that a checkpoint keeps."""


def _as_logged(saved: dict[str, Any], trainer: Trainer) -> Any:
    """Return the entry of Lightning's result collection that `_results` saved."""
    meta = _Metadata(**saved["meta"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, **saved["sync"])
    item = _ResultMetric(meta, is_tensor=True)
    for name, total in saved["sums"].items():
        setattr(item, name, total)
    item._update_count = saved["updates"]
    return item.to(trainer.strategy.root_device)


def _restore_results(trainer: Trainer, saved: dict[str, dict[str, Any]]) -> None:
    """Restore each sum when its key is logged for the first time, which is when Lightning creates its entry."""
    results = trainer.fit_loop.epoch_loop._results
    if not saved:
        return
    update = results.update_metrics

    def update_metrics(key: str, value: Any, batch_size: int) -> None:
        state = saved.pop(key, None)
        if state is not None:
            for name, total in state["sums"].items():
                setattr(results[key], name, total)
            results[key]._update_count = state["updates"]
        update(key, value, batch_size)

    vars(results)["update_metrics"] = update_metrics


def _metrics(module: nn.Module) -> dict[str, Metric]:
    return {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}


def _metric_states(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the states of metrics that were updated since their last reset."""
    saved = {}
    for name, metric in _metrics(module).items():
        if metric._update_count:
            states = {key: getattr(metric, key) for key in metric._defaults}
            saved[name] = {"states": _copy_to_cpu(states), "updates": metric._update_count}
    return saved


def _restore_metrics(module: nn.Module, saved: dict[str, dict[str, Any]]) -> None:
    for name, metric in _metrics(module).items():
        if name in saved:
            for key, value in saved[name]["states"].items():
                setattr(metric, key, _move_to(value, metric.device))
            metric._update_count = saved[name]["updates"]
            metric._computed = None


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of whole parameters; those of sharded ones are not saved."""
    return {
        name: parameter.grad.detach()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor)
    }


def _buffer(module: nn.Module, name: str) -> Tensor:
    return module.get_buffer(name).detach()


def _is_persistent(module: nn.Module, name: str) -> bool:
    owner, _, short = name.rpartition(".")
    return short not in module.get_submodule(owner)._non_persistent_buffers_set


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _copy_to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    return [_copy_to_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value


def _move_to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _move_to(item, device) for key, item in value.items()}
    return [_move_to(item, device) for item in value] if isinstance(value, (list, tuple)) else value
