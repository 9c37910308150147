"""Optimization part of the lean loop: forward, backward and optimizer step of one micro-batch."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from time import perf_counter
from typing import Any, NoReturn

import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.trainer import call
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from trainer.runtime.step_record import StepRecord
from trainer.train.loop_plan import Plan
from trainer.train.save_points import SavePointEpochLoop

FX = "_current_fx_name"
"""Attribute from which `self.log` knows the hook that called it. Written to `__dict__`, because assigning an attribute
of an nn.Module costs 2 us, 44 times per step."""

_NONE = "`training_step` returned `None`. If this was on purpose, ignore this warning..."
_NONE_ON_RANKS = (
    "Skipping the `training_step` by returning None in distributed training is not supported."
    " It is recommended that you rewrite your training logic to avoid having to skip the step in the first place."
    " Return a loss of 0 instead, such as `0 * self(batch).sum()`: the other ranks wait for this rank's gradients."
)


class LeanOptimization(SavePointEpochLoop):
    """The work of `_AutomaticOptimization`, the strategy and the precision plugin, in one place."""

    _outputs: dict[str, Any] | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.step_record = StepRecord()

    def _call(self, plan: Plan, name: str, *arguments: Any) -> None:
        """Call the overrides of a hook."""
        hooks = plan.hooks[name]
        if hooks:
            names = plan.names
            outer, names[FX] = names[FX], name
            for hook in hooks:
                hook(*arguments)
            names[FX] = outer

    def _train(self, plan: Plan, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Run what `_AutomaticOptimization.run` does: forward, backward and, unless accumulating, the optimizer step.

        As in Lightning the optimizer is given a closure, so that optimizers which evaluate it more than once (LBFGS,
        SAM) work, and hooks before the step run in the same order. If the optimizer would evaluate it once and before
        anything else, it is evaluated here.

        Raises:
            MisconfigurationException: If the optimizer did not call the closure: nothing was trained.
        """
        strategy, optimization = plan.strategy, self.automatic_optimization
        if optimization._skip_backward:  # set by weight averaging
            arguments = self._build_kwargs(OrderedDict(), batch, batch_idx)
            return optimization.run(strategy._optimizers[0], batch_idx, arguments)
        accumulates = self.trainer.accumulate_grad_batches != 1 and self._should_accumulate()
        self._outputs = None
        if accumulates and not plan.strategy_accumulates:
            with _block_parallel_sync_behavior(strategy, block=True):
                self._closure(plan, batch, batch_idx)
        else:
            progress = optimization.optim_progress.optimizer.step
            total: Any = progress.total
            current: Any = progress.current
            if not accumulates:
                total.ready += 1
                current.ready += 1
            closure: Any = None
            if not plan.plain_optimizer_step:
                closure = self._step_through_hook(plan, batch, batch_idx)
            elif plan.closure_comes_first and not _has_pre_hooks(strategy._optimizers[0]):
                self._step_closure(plan, batch, batch_idx)
                plan.step(strategy._optimizers[0])
            else:
                evaluate: Any = partial(self._step_closure, plan, batch, batch_idx)
                strategy._optimizers[0].step(closure=evaluate)
            if not accumulates:
                total.completed += 1
                current.completed += 1
            if closure is not None:
                result = closure.consume_result()
                return {} if result.loss is None else dict(result.asdict())
        outputs, self._outputs = self._outputs, None
        if outputs is None:
            _raise_closure_not_called()
        return outputs

    def _step_through_hook(self, plan: Plan, batch: Any, batch_idx: int) -> Closure:
        """Call `LightningModule.optimizer_step` with Lightning's own `Closure`, which a module may inspect."""
        starts_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        closure = Closure(
            step_fn=partial(self._closure_result, plan, batch, batch_idx),
            backward_fn=partial(self._recorded_backward, plan),
            zero_grad_fn=partial(self._zero_grad, plan, batch_idx) if starts_step else None,
        )
        call._call_lightning_module_hook(
            self.trainer,
            "optimizer_step",
            self.trainer.current_epoch,
            batch_idx,
            plan.strategy._lightning_optimizers[0],
            closure,
        )
        return closure

    def _closure_result(self, plan: Plan, batch: Any, batch_idx: int) -> ClosureResult:
        """Return the result of the forward pass in the form that `Closure` expects."""
        loss, extra = self._forward(plan, batch, batch_idx)
        return ClosureResult(loss, extra=extra or {})

    def _step_closure(self, plan: Plan, batch: Any, batch_idx: int) -> Tensor | None:
        """Run the closure and what `Precision._wrap_closure` and `_after_closure` add to it."""
        loss = self._closure(plan, batch, batch_idx)
        trainer = self.trainer
        clips = plan.clips or trainer.gradient_clip_val
        if not (clips or plan.hooks["on_before_optimizer_step"]):
            return loss
        optimizer = plan.strategy._optimizers[0]
        self._call(plan, "on_before_optimizer_step", optimizer)
        if clips or trainer.gradient_clip_val:
            names = plan.names
            outer, names[FX] = names[FX], "optimizer_step"
            trainer.precision_plugin._clip_gradients(
                plan.module,
                optimizer,
                trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
            names[FX] = outer
        return loss

    def _closure(self, plan: Plan, batch: Any, batch_idx: int) -> Tensor | None:
        """Run forward, zero_grad (unless accumulating) and backward; returns the detached loss."""
        if not torch.is_grad_enabled():  # an optimizer that calls its closure without enabling gradients
            with torch.enable_grad():
                return self._closure(plan, batch, batch_idx)
        if self.trainer.accumulate_grad_batches == 1 and plan.takes_batch_idx:  # `_forward`, inlined
            self.step_record.losses = []
            if plan.frees_gradients_early:
                _free_gradients(plan.strategy._optimizers[0])
            names = plan.names
            outer, names[FX] = names[FX], "training_step"
            output = plan.training_step(batch, batch_idx)
            names[FX] = outer
            loss, extra = (output, None) if type(output) is Tensor else self._loss_of(output)
            self._zero_grad(plan, batch_idx)
        else:
            loss, extra = self._forward(plan, batch, batch_idx)
            if batch_idx % self.trainer.accumulate_grad_batches == 0:
                self._zero_grad(plan, batch_idx)
        if loss is None:
            self._outputs = {}
            return None
        detached = reported = loss.detach()
        if plan.copies_loss:
            reported = detached.clone()
        self._outputs = {"loss": reported, **extra} if extra else {"loss": reported}
        self.step_record.losses.append(detached)
        self.step_record.forward_ended = perf_counter()
        self._backward(plan, loss)
        return reported

    def _forward(self, plan: Plan, batch: Any, batch_idx: int) -> tuple[Tensor | None, dict[str, Any] | None]:
        """Return this micro-batch's part of the step's loss, and what else `training_step` returned."""
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self.step_record.losses = []
            if plan.frees_gradients_early:
                _free_gradients(plan.strategy._optimizers[0])
        names = plan.names
        outer, names[FX] = names[FX], "training_step"
        output = plan.training_step(batch, batch_idx) if plan.takes_batch_idx else plan.training_step(batch)
        names[FX] = outer
        if accumulate == 1 and type(output) is Tensor:
            return output, None
        return self._loss_of(output)

    def _loss_of(self, output: Any) -> tuple[Tensor | None, dict[str, Any] | None]:
        if output is None:
            if self.trainer.world_size > 1:
                raise RuntimeError(_NONE_ON_RANKS)
            Closure.warning_cache.warn(_NONE)
        result = ClosureResult.from_training_step_output(output, self.trainer.accumulate_grad_batches)
        return result.closure_loss, result.extra

    def _recorded_backward(self, plan: Plan, loss: Tensor) -> None:
        self.step_record.losses.append(loss.detach())
        self.step_record.forward_ended = perf_counter()
        self._backward(plan, loss)

    def _zero_grad(self, plan: Plan, batch_idx: int) -> None:
        trainer = self.trainer
        optimizer = plan.strategy._optimizers[0]
        progress = self.automatic_optimization.optim_progress.optimizer.zero_grad
        total: Any = progress.total
        current: Any = progress.current
        total.ready += 1
        current.ready += 1
        if plan.hooks["on_before_zero_grad"]:
            self._call(plan, "on_before_zero_grad", optimizer)
        total.started += 1
        current.started += 1
        if plan.frees_gradients_early:
            _free_gradients(optimizer)  # once more: `training_step` may have run a backward pass itself
        elif plan.plain_zero_grad:
            optimizer.zero_grad()
        else:
            call._call_lightning_module_hook(
                trainer, "optimizer_zero_grad", trainer.current_epoch, batch_idx, optimizer
            )
        total.completed += 1
        current.completed += 1

    def _backward(self, plan: Plan, loss: Tensor) -> None:
        """Run what `Strategy.backward` does: the module's `backward` between the precision plugin's two hooks."""
        names = plan.names
        outer, names[FX] = names[FX], "backward"
        if plan.plain_backward:
            hooks = plan.hooks
            if hooks["on_before_backward"]:
                self._call(plan, "on_before_backward", loss)
            if plan.plain_module_backward:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                plan.module.backward(loss)
            if hooks["on_after_backward"]:
                self._call(plan, "on_after_backward")
        else:
            self.step_record.by_loop = True
            try:
                plan.strategy.backward(loss, plan.strategy._optimizers[0])
            finally:
                self.step_record.by_loop = False
        names[FX] = outer


def _free_gradients(optimizer: Optimizer) -> None:
    """Do what `Optimizer.zero_grad` does, without its 25 us for the profiler and the compiler."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _has_pre_hooks(optimizer: Optimizer) -> bool:
    """Return whether there are hooks that torch calls before a step: also before the closure."""
    return bool(optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks)


def _raise_closure_not_called() -> NoReturn:
    """Raise what Lightning raises if an optimizer does not call its closure."""
    Closure(step_fn=_raise_closure_not_called).consume_result()
    raise AssertionError
