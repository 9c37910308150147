"""Saves what Lightning keeps in memory only, without which a resume in the middle of an epoch computes something else.

- the logged metrics so far: `trainer.callback_metrics`, which schedulers and early stopping read, and the sums behind
  `self.log(..., on_epoch=True)`;
- the states of torchmetrics objects, which are not in a state dict, on each rank;
- buffers with `persistent=False` that have changed since the training began;
- which parameters are frozen: callbacks freeze and thaw them at the start of an epoch;
- gradients, where the module optimizes manually: it may be accumulating them.

Python attributes of modules and callbacks are not among it: those belong in `on_save_checkpoint` or `state_dict`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric


class InMemory(Callback):
    """Each rank restores its own; at another world size only what the ranks have in common is restored.

    `group` is the CPU (gloo) group; None for one rank.
    """

    def __init__(self, rank: int, group: torch.distributed.ProcessGroup | None) -> None:
        self._rank = rank
        self._group = group
        self._trainer: Trainer | None = None
        self._buffers: dict[str, tuple[Tensor, int]] = {}
        """Of the non-persistent ones as training began: the tensor and its version."""
        self._changed: set[str] = set()
        """Non-persistent buffers that an earlier attempt had changed."""
        self._saved: dict[str, Any] | None = None
        self._restored: dict[str, Any] | None = None
        """What was restored in `on_train_start`, until all of those hooks have run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Lightning calls this on every rank, so the ranks can gather here; only the first writes."""
        trainer = self._trainer
        if trainer is None:
            return {}
        module = trainer.lightning_module
        mine = {
            "results": _results(trainer),
            "metrics": _metric_states(module),
            "buffers": {name: _buffer(module, name) for name in self._changed_buffers(module)},
        }
        ranks: list[Any] = [mine]
        if self._group is not None:
            ranks = [None] * torch.distributed.get_world_size(self._group)
            torch.distributed.all_gather_object(ranks, mine, group=self._group)
        logged = trainer._logger_connector._callback_metrics
        return {
            "ranks": ranks,
            "callback_metrics": {name: torch.as_tensor(value).detach().cpu() for name, value in logged.items()},
            "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
            "gradients": {} if module.automatic_optimization else _gradients(module),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved, self._saved = self._saved, None
        self._buffers = {
            name: (buffer, _version(buffer))
            for name, buffer in pl_module.named_buffers()
            if not _is_persistent(pl_module, name)
        }
        if not saved:
            return
        if len(saved["ranks"]) == trainer.world_size:
            _restore_results(trainer, _moved(saved["ranks"][self._rank]["results"], pl_module.device))
        self._restored = saved
        self._restore(trainer, pl_module, saved)

    def restore_again(self) -> None:
        """After every `on_train_start`: one that resets a metric did so before the checkpoint, not after it."""
        saved, self._restored = self._restored, None
        if saved is not None and self._trainer is not None:
            self._restore(self._trainer, self._trainer.lightning_module, saved)

    def _restore(self, trainer: Trainer, pl_module: LightningModule, saved: dict[str, Any]) -> None:
        device = pl_module.device
        trainer._logger_connector._callback_metrics.update(_moved(saved["callback_metrics"], device))
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
        """What was restored for the rest of an epoch and not logged again in it is over."""
        vars(trainer.fit_loop.epoch_loop._results).pop("update_metrics", None)

    def _changed_buffers(self, module: LightningModule) -> list[str]:
        """By name; what is assigned anew or written in place counts, writes through `.data` are not seen."""
        found = []
        for name, buffer in module.named_buffers():
            before = self._buffers.get(name)
            same = before is not None and before[0] is buffer and before[1] == _version(buffer)
            if not _is_persistent(module, name) and (name in self._changed or not same):
                found.append(name)
        return found


def _results(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The sums of `self.log` in this epoch, by key of Lightning's collection."""
    found = {}
    for key, item in trainer.fit_loop.epoch_loop._results.items():
        if item.has_reset or not item.is_tensor:
            continue
        sums = {name: getattr(item, name).detach().cpu().clone() for name in item._defaults}
        found[key] = {"sums": sums, "updates": item._update_count}
    return found


def _restore_results(trainer: Trainer, saved: dict[str, dict[str, Any]]) -> None:
    """Put each sum in place when its key is logged for the first time, which is when Lightning makes its entry."""
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
    """Of those that were updated since they were reset."""
    found = {}
    for name, metric in _metrics(module).items():
        if metric._update_count:
            states = {key: getattr(metric, key) for key in metric._defaults}
            found[name] = {"states": _copied(states), "updates": metric._update_count}
    return found


def _restore_metrics(module: nn.Module, saved: dict[str, dict[str, Any]]) -> None:
    for name, metric in _metrics(module).items():
        if name in saved:
            for key, value in saved[name]["states"].items():
                setattr(metric, key, _moved(value, metric.device))
            metric._update_count = saved[name]["updates"]
            metric._computed = None


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of whole parameters; a shard's stays on its rank."""
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


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, (list, tuple)) else value
