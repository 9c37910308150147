"""Plan of an epoch's training steps: lookups on the module, the callbacks, the strategy and the precision plugin.

Lightning repeats these lookups on every batch: which hooks are overridden, whether `training_step` takes a
`batch_idx`, whether there is validation. Here they are done once per epoch, and again when the callbacks, the optimizer
or the attributes of the module have changed (`Plan.is_current`).

A part of the step is *plain* when the strategy and the precision plugin use Lightning's base methods for it
(`train/loop_originals.py`), which `train/loop.py` and `train/loop_step.py` inline. A part that is not plain is left to
the method of the strategy or the plugin (FSDP's backward, DeepSpeed's optimizer step, a gradient scaler), so that an
unknown strategy is correct, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.optimization import _AutomaticOptimization
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.combined_loader import CombinedLoader, _MaxSizeCycle
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import LBFGS, Optimizer

from trainer.train import prefetch
from trainer.train.loop_originals import HOOKS, TRANSFER_HOOKS, first_patched, original
from trainer.train.plain_step import make_step
from trainer.train.prefetch import Prefetcher

_CPU = torch.device("cpu")
_KNOWN_PACKAGES = ("lightning", "pytorch_lightning", "trainer")
"""Packages whose callbacks do not read gradients in `on_exception`."""


@dataclass
class Plan:
    """Results of the lookups for one epoch."""

    module: LightningModule
    names: dict[str, Any]
    """The attributes of the module, its `__dict__`."""
    strategy: Strategy
    next_batch: Callable[[], Any]
    prefetcher: Prefetcher | None
    """Fetches one batch ahead, on a GPU."""
    hooks: dict[str, list[Callable[..., Any]]]
    """Overrides of each of HOOKS in Lightning's order: callbacks, the module, the strategy."""
    module_batch_start: Callable[..., Any] | None
    """The module's own `on_train_batch_start`, which may return -1 to skip the rest of the epoch."""
    has_start_hooks: bool
    to_device: Callable[[Any], Any]
    training_step: Callable[..., Any]
    """Called through the wrapper (DDP), in the context of the precision plugin."""
    takes_batch_idx: bool
    strategy_accumulates: bool
    """Whether the strategy decides itself when to step (DeepSpeed), and is called for every micro-batch."""
    plain_backward: bool
    plain_module_backward: bool
    """Whether the module's `backward` is `loss.backward()`."""
    plain_optimizer_step: bool
    closure_comes_first: bool
    """Whether the optimizer would evaluate the closure once, before anything else."""
    step: Callable[[Optimizer], object]
    """Steps the optimizer once its closure has been evaluated."""
    plain_zero_grad: bool
    frees_gradients_early: bool
    """Whether gradients are not read when they are zeroed, so that they need not live through the forward pass."""
    clips: bool
    """Whether the module or the precision plugin may clip even if `trainer.gradient_clip_val` is not set."""
    copies_loss: bool
    """Whether something may change the loss in place before `on_train_batch_end` gets it."""
    plain_scheduler_step: bool
    has_validation: bool
    """Whether there are a loader and a step for validation; when to validate is decided on each batch."""
    epoch_number: int
    """Number of the epoch, from 1."""
    callbacks: list[Callback]
    optimizers: list[Optimizer]
    num_attributes: int
    """Number of the module's attributes at the time of the lookups."""
    without_plateaus: list[LRSchedulerConfig] = field(default_factory=list)
    """Schedulers that were checked last, if none of them needs a metric."""

    def is_current(self, trainer: Trainer) -> bool:
        """Return whether callbacks, optimizers and the module's attributes are still those of the lookups."""
        return (
            trainer.callbacks == self.callbacks  # type: ignore[attr-defined]
            and self.strategy._optimizers == self.optimizers
            and len(self.names) == self.num_attributes
        )


def why_not_lean(trainer: Trainer, data_fetcher: _DataFetcher) -> str | None:
    """Return why the lean loop cannot run, as text for the log; None if it can."""
    optimization = trainer.fit_loop.epoch_loop.automatic_optimization
    if not trainer.lightning_module.automatic_optimization:
        return "the module optimizes manually"
    if isinstance(data_fetcher, _DataLoaderIterDataFetcher):
        return "training_step takes a dataloader_iter"
    if len(trainer.optimizers) != 1:
        return f"there are {len(trainer.optimizers)} optimizers"
    if type(optimization) is not _AutomaticOptimization:
        return f"the optimization loop is a {type(optimization).__name__}"
    if optimization._skip_backward:
        return "a callback requests that backward is skipped"
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if type(profiler) is not PassThroughProfiler:
        return f"{type(profiler).__name__} records every hook"
    instances = (optimization, trainer._logger_connector, data_fetcher, trainer.lightning_module)
    if patched := first_patched(*instances, trainer.strategy._forward_redirection):
        return f"{patched} has been replaced"
    return None


def make_plan(trainer: Trainer, data_fetcher: _DataFetcher) -> Plan:
    """Do all lookups. The Trainer must be fitting, with the strategy set up."""
    module, strategy, precision = trainer.lightning_module, trainer.strategy, trainer.precision_plugin
    optimizer = strategy._optimizers[0]
    plain_zero_grad = not _override("optimizer_zero_grad", module, LightningModule)
    prefetcher = _make_prefetcher(trainer, data_fetcher)
    hooks = {name: _overrides(name, trainer) for name in HOOKS}
    module_batch_start = _override("on_train_batch_start", module, LightningModule)
    return Plan(
        module=module,
        names=module.__dict__,
        strategy=strategy,
        next_batch=_make_fetch(data_fetcher) if prefetcher is None else prefetcher.next_batch,
        prefetcher=prefetcher,
        hooks=hooks,
        module_batch_start=module_batch_start,
        has_start_hooks=bool(hooks["on_train_batch_start"])
        or module_batch_start is not None
        or not _inherits(strategy, "on_train_batch_start", Strategy),
        to_device=_make_transfer(trainer),
        training_step=_make_training_step(strategy, precision, module),
        takes_batch_idx=is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2),
        strategy_accumulates=strategy.handles_gradient_accumulation,
        plain_backward=_plain_backward(strategy, precision),
        plain_module_backward=module._fabric is None and not _override("backward", module, LightningModule),
        plain_optimizer_step=_plain_optimizer_step(strategy, precision, module),
        closure_comes_first=evaluates_closure_first(optimizer),
        step=make_step(optimizer),
        plain_zero_grad=plain_zero_grad,
        frees_gradients_early=plain_zero_grad
        and not hooks["on_before_zero_grad"]
        and _inherits(optimizer, "zero_grad", Optimizer)
        and not any(map(_may_read_gradients, trainer.callbacks)),  # type: ignore[attr-defined]
        clips=bool(_override("configure_gradient_clipping", module, LightningModule))
        or bool(_override("clip_gradients", module, LightningModule))
        or not _plain_precision(precision, "clip_gradients"),
        copies_loss=any(map(_may_modify_inputs, hooks["on_before_backward"]))
        or bool(_override("backward", module, LightningModule))
        or not _plain_backward(strategy, precision),
        plain_scheduler_step=not _override("lr_scheduler_step", module, LightningModule),
        has_validation=trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
        and is_overridden("validation_step", module),
        epoch_number=trainer.current_epoch + 1,
        callbacks=list(trainer.callbacks),  # type: ignore[attr-defined]
        optimizers=list(strategy._optimizers),
        num_attributes=len(module.__dict__),
    )


def _override(name: str, owner: object, base: type) -> Callable[..., Any] | None:
    """Return the bound method if it is not `base`'s own; attributes set on the instance and mocks count, too."""
    method = getattr(owner, name)
    inherited = getattr(method, "__func__", method) is original(base, name)
    return method if callable(method) and not inherited else None


def _overrides(name: str, trainer: Trainer) -> list[Callable[..., Any]]:
    """Return the overrides of a hook that the lean loop must call: callbacks first, then the module."""
    module = trainer.lightning_module
    overrides: list[Callable[..., Any]] = [
        partial(override, trainer, module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if (override := _override(name, callback, Callback)) is not None
        and not getattr(override, "is_filled_by_lean_loop", False)
    ]
    override = _override(name, module, LightningModule)
    if override is not None and name != "on_train_batch_start":
        overrides.append(override)
    return overrides


def _may_modify_inputs(hook: Callable[..., Any]) -> bool:
    """Return whether this hook may change its arguments in place; not if its callback sets `read_only`."""
    function = hook.func if isinstance(hook, partial) else hook
    return not getattr(getattr(function, "__self__", None), "read_only", False)


def _may_read_gradients(callback: Callback) -> bool:
    """Return whether this callback may read the previous step's gradients after an exception in `training_step`."""
    is_known = type(callback).__module__.partition(".")[0] in _KNOWN_PACKAGES
    return not is_known and _override("on_exception", callback, Callback) is not None


def _inherits(owner: object, name: str, *bases: type) -> bool:
    """Return whether `owner` inherits this method unchanged from one of `bases`."""
    return getattr(type(owner), name) in [original(base, name) for base in bases] and name not in vars(owner)


def _plain_precision(precision: Precision, *names: str) -> bool:
    """Return whether these methods equal `Precision`'s own; MixedPrecision's do if it has no scaler."""
    bases: tuple[type, ...] = (Precision,)
    if isinstance(precision, MixedPrecision) and precision.scaler is None:
        bases = (Precision, MixedPrecision)
    return all(_inherits(precision, name, *bases) for name in names)


def _plain_backward(strategy: Strategy, precision: Precision) -> bool:
    """Return whether backward is plain; DDP's pre_backward and post_backward do nothing in automatic optimization."""
    return (
        _inherits(strategy, "backward", Strategy)
        and _inherits(strategy, "pre_backward", Strategy, DDPStrategy)
        and _inherits(strategy, "post_backward", Strategy, DDPStrategy)
        and _plain_precision(precision, "pre_backward", "backward", "post_backward")
    )


def _plain_optimizer_step(strategy: Strategy, precision: Precision, module: LightningModule) -> bool:
    """Return whether module, Lightning's wrapper, strategy and plugin all leave the optimizer step as it is."""
    wrapper: Any = strategy._lightning_optimizers[0]
    wraps_only = (
        wrapper is not strategy._optimizers[0]
        and type(wrapper).step is original(LightningOptimizer, "step")
        and "step" not in vars(wrapper)
        and wrapper._on_before_step is wrapper._on_after_step is do_nothing_closure
    )
    averages = getattr(strategy, "_model_averager", None) is not None
    return (
        not _override("optimizer_step", module, LightningModule)
        and wraps_only
        and _inherits(strategy, "optimizer_step", Strategy, DDPStrategy)
        and not averages
        and _plain_precision(precision, "optimizer_step", "_wrap_closure", "_after_closure", "_clip_gradients")
    )


def evaluates_closure_first(optimizer: Optimizer) -> bool:
    """Return whether `step(closure)` equals `closure()`, then `step()`: torch's own optimizers except LBFGS.

    A scheduler of torch replaces `step` of the instance to note that it was called. Any other replacement may evaluate
    the closure as it likes.
    """
    kind = type(optimizer)
    step = vars(optimizer).get("step")
    if step is not None and not (getattr(step, "_wrapped_by_lr_sched", False) and step.__wrapped__ is kind.step):
        return False
    modules = kind.__module__, inspect.unwrap(kind.step).__module__
    return kind is not LBFGS and all(f"{module}.".startswith("torch.optim.") for module in modules)


def _make_fetch(fetcher: _DataFetcher) -> Callable[[], Any]:
    """Return a function that gives the next batch; for one sized loader without Lightning's seven calls around it."""
    combined = fetcher.combined_loader
    iterator = combined._iterator
    one_loader = (
        type(fetcher) is _PrefetchDataFetcher
        and fetcher.length is not None
        and not fetcher.batches
        and fetcher.iterator is combined
        and type(combined) is CombinedLoader
        and type(iterator) is _MaxSizeCycle
        and combined._spec.is_leaf()
    )
    if not one_loader:
        return lambda: next(fetcher)[0]

    def fetch() -> Any:
        if combined._iterator is not iterator:
            return next(fetcher)[0]
        if fetcher.done:
            raise StopIteration
        try:
            batches, _, _ = iterator.__next__()  # type: ignore[union-attr]
        except StopIteration:
            fetcher.done = True
            raise
        fetcher.fetched += 1
        fetcher.done = fetcher.fetched >= fetcher.length  # type: ignore[operator]
        return batches[0]

    return fetch


def _make_prefetcher(trainer: Trainer, fetcher: _DataFetcher) -> Prefetcher | None:
    """Return the prefetcher if `trainer.prefetch_to_device` is set and no hook moves a batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    if getattr(loop, "copy_stream", None) is None:
        return None
    current = loop.plan.prefetcher if loop.plan is not None else None
    transfer = _make_transfer(trainer)
    if transfer is _keep_on_cpu or isinstance(transfer, partial):
        return prefetch.make(current, trainer, fetcher, _make_fetch(fetcher), loop.copy_stream)
    if current is not None:  # a hook that moves batches was added in mid-epoch
        current.settle()
    return None


def _make_training_step(strategy: Strategy, precision: Precision, module: LightningModule) -> Callable[..., Any]:
    """Return `Strategy.training_step`: the module's own, called through the forward of its wrapper."""
    plain = (
        _inherits(strategy, "training_step", Strategy)
        and _inherits(strategy, "post_training_step", Strategy)
        and _inherits(precision, "train_step_context", Precision)
        and type(strategy._forward_redirection) in (_ForwardRedirection, _DDPForwardRedirection)
    )
    if not plain:

        def strategy_step(*arguments: Any) -> Any:
            output = strategy.training_step(*arguments)
            strategy.post_training_step()
            return output

        return strategy_step
    step = _redirected(strategy.model, module) if strategy.model is not module else module.training_step
    if _inherits(precision, "forward_context", FabricPrecision):
        return step

    def in_context(*arguments: Any) -> Any:
        with precision.forward_context():
            return step(*arguments)

    return in_context


def _redirected(wrapper: Any, module: LightningModule) -> Callable[..., Any]:
    """Return the forward redirection of Lightning: the wrapper calls `module.forward`, once the training step."""
    names = module.__dict__
    forward: Any = None

    def inner(*arguments: Any) -> Any:
        names["forward"] = forward  # the step may call it
        return module.training_step(*arguments)

    def outer(*arguments: Any) -> Any:
        nonlocal forward
        forward = module.forward
        names["forward"] = inner
        return wrapper(*arguments)

    return outer


def _make_transfer(trainer: Trainer) -> Callable[[Any], Any]:
    """Return a function that converts and moves a batch as Lightning does; directly if nothing is overridden."""
    module, strategy = trainer.lightning_module, trainer.strategy
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    overridden = any(
        _override(name, module, LightningModule)
        or (datamodule is not None and _override(name, datamodule, LightningDataModule))
        for name in TRANSFER_HOOKS
    )
    plain_parts = _inherits(strategy, "batch_to_device", Strategy) and _inherits(
        trainer.precision_plugin, "convert_input", FabricPrecision
    )
    if plain_parts and not overridden:
        device = strategy.root_device
        return _keep_on_cpu if device.type == "cpu" else partial(_move, device=device)

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)

    return transfer


def _keep_on_cpu(batch: Any) -> Any:
    """Return a list or tuple of tensors of the CPU as it is (a list as a new one); move everything else to the CPU."""
    kind = type(batch)
    if kind is not tuple and kind is not list:
        return move_data_to_device(batch, _CPU)
    for one in batch:
        if type(one) is not torch.Tensor or not one.is_cpu:
            return move_data_to_device(batch, _CPU)
    return batch if kind is tuple else list(batch)


def _move(batch: Any, device: torch.device) -> Any:
    """Move a list or tuple of tensors with one `to` each, and everything else with Lightning's function."""
    kind = type(batch)
    if kind is not tuple and kind is not list:
        return move_data_to_device(batch, device)
    for one in batch:
        if type(one) is not torch.Tensor:
            return move_data_to_device(batch, device)
    # As in Lightning: a copy to a GPU may be asynchronous; one to the CPU or to MPS must not.
    non_blocking = device.type not in ("cpu", "mps")
    return kind([one.to(device, non_blocking=non_blocking) for one in batch])
