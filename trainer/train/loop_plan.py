"""What an epoch's training steps need to know of the module, the callbacks, the strategy and the precision plugin.

Lightning looks all of this up again on every batch: which hooks are overridden, whether `training_step` takes a
`batch_idx`, whether there is validation. Here it is looked up once an epoch, and again when the callbacks, the
optimizer or the attributes of the module have changed (`Plan.is_of`).

Each part of a step is *plain* when the strategy and the precision plugin use Lightning's base methods for it
(`train/loop_own.py`), which are then written out in `train/loop.py`. A part that is not plain is left to the
strategy's or the plugin's own method (FSDP's backward, DeepSpeed's optimizer step, a gradient scaler), so that a
strategy unknown here is right, too.
"""

from __future__ import annotations

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
from torch.optim import Optimizer

from trainer.train.loop_own import HOOKS, TRANSFER_HOOKS, own, replaced_in_frame

_KNOWN_PACKAGES = ("lightning", "pytorch_lightning", "trainer")
"""Whose callbacks do not look at gradients in `on_exception`."""


@dataclass
class Plan:
    """One epoch's answers."""

    module: LightningModule
    strategy: Strategy
    next_batch: Callable[[], Any]
    hooks: dict[str, list[Callable[..., Any]]]
    """For each of HOOKS what overrides it, in Lightning's order: callbacks, the module, the strategy."""
    module_batch_start: Callable[..., Any] | None
    """The module's own `on_train_batch_start`, whose -1 ends the epoch."""
    has_start_hooks: bool
    to_device: Callable[[Any], Any]
    training_step: Callable[..., Any]
    """Through the wrapper (DDP), in the context of the precision."""
    takes_batch_idx: bool
    strategy_accumulates: bool
    """The strategy decides itself when to step (DeepSpeed), and is called for every micro-batch."""
    plain_backward: bool
    plain_optimizer_step: bool
    plain_zero_grad: bool
    frees_gradients_early: bool
    """Nobody looks at them when they are zeroed, so they need not live through the forward pass."""
    clips: bool
    """The module or the precision plugin has its say, also where `trainer.gradient_clip_val` is not set."""
    copies_loss: bool
    """Something may change the loss in place before `on_train_batch_end` sees it."""
    plain_scheduler_step: bool
    has_validation: bool
    """There is something to validate with; whether it is, `trainer` says on each batch."""
    epoch_number: int
    """From 1."""
    callbacks: list[Callback]
    optimizers: list[Optimizer]
    num_attributes: int
    """Of the module, when this was looked up."""
    without_plateaus: list[LRSchedulerConfig] = field(default_factory=list)
    """The schedulers that were looked at last, if none of them waits for a metric."""

    def is_of(self, trainer: Trainer) -> bool:
        """Whether what was looked up still is what there is, as far as five comparisons tell."""
        return (
            trainer.callbacks == self.callbacks  # type: ignore[attr-defined]
            and self.strategy._optimizers == self.optimizers
            and len(self.module.__dict__) == self.num_attributes
        )


def why_not_lean(trainer: Trainer, data_fetcher: _DataFetcher) -> str | None:
    """What the lean loop does not do, as words for the log; None where it can train."""
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
        return "a callback asks to skip backward"
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if type(profiler) is not PassThroughProfiler:
        return f"{type(profiler).__name__} wants every hook in its table"
    instances = (optimization, trainer._logger_connector, data_fetcher, trainer.lightning_module)
    if replaced := replaced_in_frame(*instances, trainer.strategy._forward_redirection):
        return f"{replaced} has been replaced"
    return None


def make_plan(trainer: Trainer, data_fetcher: _DataFetcher) -> Plan:
    """Look everything up. The Trainer must be fitting, with the strategy set up."""
    module, strategy, precision = trainer.lightning_module, trainer.strategy, trainer.precision_plugin
    optimizer = strategy._optimizers[0]
    plain_zero_grad = not _override("optimizer_zero_grad", module, LightningModule)
    hooks = {name: _overrides(name, trainer) for name in HOOKS}
    module_batch_start = _override("on_train_batch_start", module, LightningModule)
    return Plan(
        module=module,
        strategy=strategy,
        next_batch=_fetch(data_fetcher),
        hooks=hooks,
        module_batch_start=module_batch_start,
        has_start_hooks=bool(hooks["on_train_batch_start"])
        or module_batch_start is not None
        or not _inherits(strategy, "on_train_batch_start", Strategy),
        to_device=_transfer(trainer),
        training_step=_training_step(strategy, precision, module),
        takes_batch_idx=is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2),
        strategy_accumulates=strategy.handles_gradient_accumulation,
        plain_backward=_plain_backward(strategy, precision),
        plain_optimizer_step=_plain_optimizer_step(strategy, precision, module),
        plain_zero_grad=plain_zero_grad,
        frees_gradients_early=plain_zero_grad
        and not hooks["on_before_zero_grad"]
        and _inherits(optimizer, "zero_grad", Optimizer)
        and not any(map(_may_look_at_gradients, trainer.callbacks)),  # type: ignore[attr-defined]
        clips=bool(_override("configure_gradient_clipping", module, LightningModule))
        or bool(_override("clip_gradients", module, LightningModule))
        or not _plain_precision(precision, "clip_gradients"),
        copies_loss=any(map(_may_write, hooks["on_before_backward"]))
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
    """The bound method where it is not `base`'s own. Also true of attributes set on the instance, and of mocks."""
    found = getattr(owner, name)
    inherited = getattr(found, "__func__", found) is own(base, name)
    return found if callable(found) and not inherited else None


def _overrides(name: str, trainer: Trainer) -> list[Callable[..., Any]]:
    module = trainer.lightning_module
    found: list[Callable[..., Any]] = [
        partial(override, trainer, module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if (override := _override(name, callback, Callback)) is not None
        and not getattr(override, "is_noted_by_the_loop", False)
    ]
    override = _override(name, module, LightningModule)
    if override is not None and name != "on_train_batch_start":
        found.append(override)
    return found


def _may_write(hook: Callable[..., Any]) -> bool:
    """Whether this hook may change what it is given in place: unless its callback says `only_looks`."""
    function = hook.func if isinstance(hook, partial) else hook
    return not getattr(getattr(function, "__self__", None), "only_looks", False)


def _may_look_at_gradients(callback: Callback) -> bool:
    """Whether this callback may want, after an exception in `training_step`, the gradients of the step before."""
    is_known = type(callback).__module__.partition(".")[0] in _KNOWN_PACKAGES
    return not is_known and _override("on_exception", callback, Callback) is not None


def _inherits(owner: object, name: str, *bases: type) -> bool:
    """Whether the class of `owner` has this method from one of `bases`, which its subclasses left as it is."""
    return getattr(type(owner), name) in [own(base, name) for base in bases] and name not in vars(owner)


def _plain_precision(precision: Precision, *names: str) -> bool:
    """Whether these methods do what `Precision`'s own do; MixedPrecision's do where it has no scaler."""
    bases: tuple[type, ...] = (Precision,)
    if isinstance(precision, MixedPrecision) and precision.scaler is None:
        bases = (Precision, MixedPrecision)
    return all(_inherits(precision, name, *bases) for name in names)


def _plain_backward(strategy: Strategy, precision: Precision) -> bool:
    """DDP's own pre_backward and post_backward do nothing under automatic optimization."""
    return (
        _inherits(strategy, "backward", Strategy)
        and _inherits(strategy, "pre_backward", Strategy, DDPStrategy)
        and _inherits(strategy, "post_backward", Strategy, DDPStrategy)
        and _plain_precision(precision, "pre_backward", "backward", "post_backward")
    )


def _plain_optimizer_step(strategy: Strategy, precision: Precision, module: LightningModule) -> bool:
    """Whether nobody comes between the loop and the optimizer: the module, Lightning's wrapper, strategy, plugin."""
    wrapper = strategy._lightning_optimizers[0]
    wraps_only = (
        wrapper is not strategy._optimizers[0]
        and type(wrapper).step is own(LightningOptimizer, "step")
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


def _fetch(fetcher: _DataFetcher) -> Callable[[], Any]:
    """The next batch; of a single loader with a length without the seven calls that Lightning makes around it."""
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


def _training_step(strategy: Strategy, precision: Precision, module: LightningModule) -> Callable[..., Any]:
    """`Strategy.training_step`: the module's own, called through the forward of what wraps it."""
    plain = (
        _inherits(strategy, "training_step", Strategy)
        and _inherits(strategy, "post_training_step", Strategy)
        and _inherits(precision, "train_step_context", Precision)
        and type(strategy._forward_redirection) in (_ForwardRedirection, _DDPForwardRedirection)
    )
    if not plain:

        def left_to_the_strategy(*arguments: Any) -> Any:
            output = strategy.training_step(*arguments)
            strategy.post_training_step()
            return output

        return left_to_the_strategy
    step = _redirected(strategy.model, module) if strategy.model is not module else module.training_step
    if _inherits(precision, "forward_context", FabricPrecision):
        return step

    def in_context(*arguments: Any) -> Any:
        with precision.forward_context():
            return step(*arguments)

    return in_context


def _redirected(wrapper: Any, module: LightningModule) -> Callable[..., Any]:
    """`_ForwardRedirection`: the wrapper calls `module.forward`, which for this once is the training step."""
    names = module.__dict__
    forward: Any = None

    def inner(*arguments: Any) -> Any:
        names["forward"] = forward  # the step may well call it
        return module.training_step(*arguments)

    def outer(*arguments: Any) -> Any:
        nonlocal forward
        forward = module.forward
        names["forward"] = inner
        return wrapper(*arguments)

    return outer


def _transfer(trainer: Trainer) -> Callable[[Any], Any]:
    """Convert and move a batch as Lightning does; directly where nobody overrides a part of it."""
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
        return partial(_move, device=strategy.root_device)

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)

    return transfer


def _move(batch: Any, device: torch.device) -> Any:
    """A list or tuple of tensors costs one `to` each; everything else goes Lightning's way."""
    kind = type(batch)
    if kind is not tuple and kind is not list:
        return move_data_to_device(batch, device)
    for one in batch:
        if type(one) is not torch.Tensor:
            return move_data_to_device(batch, device)
    # As Lightning: a copy to a GPU need not be waited for; to the CPU and to MPS it must.
    non_blocking = device.type not in ("cpu", "mps")
    return kind([one.to(device, non_blocking=non_blocking) for one in batch])
