"""Lightning's original methods, recorded at import time, before any user code is imported.

The lean loop inlines many of them instead of calling them. That is correct only while they are Lightning's own:
`mock.patch.object(Strategy, "backward", ...)`, or a library that instruments Lightning, patches a method for every
caller, and the patch must be called. So a method counts as Lightning's own if it equals the function recorded here, not
the one that the class has now.
"""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core import hooks as module_hooks
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.optimization import _AutomaticOptimization
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.optimization.closure import AbstractClosure
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.optim import Optimizer

HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""Hooks of a step that both callbacks and modules have."""

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

_PRECISION = (
    "pre_backward",
    "backward",
    "post_backward",
    "optimizer_step",
    "_wrap_closure",
    "_after_closure",
    "_clip_gradients",
    "clip_gradients",
    "train_step_context",
)
_STRATEGY = (
    "on_train_batch_start",
    "batch_to_device",
    "training_step",
    "post_training_step",
    "pre_backward",
    "backward",
    "post_backward",
    "optimizer_step",
)

OVERRIDABLE_METHODS: dict[type, tuple[str, ...]] = {
    Callback: (*HOOKS, "on_exception"),
    LightningModule: (
        *HOOKS,
        *TRANSFER_HOOKS,
        "backward",
        "clip_gradients",
        "configure_gradient_clipping",
        "lr_scheduler_step",
        "optimizer_step",
        "optimizer_zero_grad",
    ),
    LightningDataModule: TRANSFER_HOOKS,
    Strategy: _STRATEGY,
    DDPStrategy: ("pre_backward", "post_backward", "optimizer_step"),
    Precision: _PRECISION,
    MixedPrecision: _PRECISION,
    FabricPrecision: ("convert_input", "forward_context"),
    LightningOptimizer: ("step",),
    Optimizer: ("zero_grad",),
}
"""Methods that the loop calls, one by one, as soon as they are overridden or patched."""

INLINED_METHODS: dict[Any, tuple[str, ...]] = {
    _TrainingEpochLoop: (
        "_accumulated_batches_reached",
        "_build_kwargs",
        "_num_ready_batches_reached",
        "_should_accumulate",
        "_should_check_val_epoch",
        "_update_learning_rates",
        "advance",
        "done",
        "on_advance_end",
        "on_iteration_done",
        "reset_restart_stage",
        "run",
        "update_lr_schedulers",
    ),
    _AutomaticOptimization: (
        "_make_backward_fn",
        "_make_closure",
        "_make_step_fn",
        "_make_zero_grad_fn",
        "_on_before_zero_grad",
        "_optimizer_step",
        "_optimizer_zero_grad",
        "_training_step",
        "run",
    ),
    Closure: ("__call__", "closure"),
    AbstractClosure: ("consume_result",),
    ClosureResult: ("asdict", "from_training_step_output"),
    _LoggerConnector: ("on_batch_start", "on_batch_end", "update_train_step_metrics", "metrics"),
    _ResultCollection: ("metrics", "_get_cache", "_forked_name", "valid_items"),
    _DataFetcher: ("__next__",),
    _PrefetchDataFetcher: ("__next__",),
    CombinedLoader: ("__next__",),
    _ForwardRedirection: ("__call__", "on_after_inner_forward", "on_after_outer_forward"),
    _DDPForwardRedirection: ("on_after_inner_forward", "on_after_outer_forward"),
    LightningModule: ("_apply_batch_transfer_handler", "_call_batch_hook", "_on_before_batch_transfer"),
    Trainer: ("num_training_batches",),
    call: ("_call_callback_hooks", "_call_lightning_module_hook", "_call_strategy_hook"),
    module_hooks: ("move_data_to_device",),
}
"""Methods that the loop always inlines: if one of them is patched, Lightning's own loop runs the whole step."""

_ORIGINALS: dict[tuple[Any, str], Any] = {
    (owner, name): getattr(owner, name)
    for table in (OVERRIDABLE_METHODS, INLINED_METHODS)
    for owner, names in table.items()
    for name in names
}


def original(owner: Any, name: str) -> Any:
    """Return Lightning's original function of that name, patched or not."""
    return _ORIGINALS[owner, name]


def first_patched(*instances: object) -> str | None:
    """Return the first of INLINED_METHODS that was patched, on its class or on one of `instances`."""
    for owner, names in INLINED_METHODS.items():
        for name in names:
            if getattr(owner, name) != _ORIGINALS[owner, name]:
                return f"{owner.__name__}.{name}"
    for instance in instances:
        for owner in type(instance).__mro__:
            for name in INLINED_METHODS.get(owner, ()):
                if name in vars(instance):
                    return f"{type(instance).__name__}.{name}"
    return None
