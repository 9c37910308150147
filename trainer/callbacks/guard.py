"""Stops, skips or rolls back on a loss spike, or on a loss or gradient that is not finite, before the update is saved.

One number per step shows whether everything is finite: the sum of the gradients' norms, or on the CPU a flag. It is
made from the losses instead where gradients are not accessible (DeepSpeed) or are scaled (16-mixed). Data parallel
ranks have equal gradients and need no communication; with sharded gradients the number is summed over the ranks, on the
device. Where gradients are clipped by norm, that norm is the number: they are not read a second time, nor summed. To
detect spikes, the mean loss of the step is sent as a second number, which is always summed.

On the CPU the number is read before the optimizer step. On a GPU that would wait for the device on every step: there it
is read `LAG_STEPS` steps later, and always before a checkpoint is written, so that weights after a bad update are never
saved. Only `skip`, and a step that was bad in an earlier attempt, wait for it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.callbacks.gradient_check import (
    FiniteGradientCheck,
    first_non_finite,
    local_gradients,
    non_finite_flag,
    sum_of_norms,
)
from trainer.callbacks.spikes import LossSpikes
from trainer.config.schema import ResilienceOptions
from trainer.core.errors import TrainerError
from trainer.data.order import GlobalBatchSampler
from trainer.runs.directory import RunDirectory
from trainer.runs.events import BadStepEvent, BadStepName
from trainer.runtime.clipping import ReportedClipping, clips_by_norm, reported_clipping
from trainer.runtime.step_record import StepRecord, filled_by_lean_loop, step_record_of

_OPTIONS: dict[BadStepName, str] = {"not_finite": "on_nonfinite", "loss_spike": "on_spike"}
"""Event to the option of the section `resilience` that chooses the policy."""
_ACTIONS = {"stop": "stopped", "skip": "skipped", "rollback": "rolled back"}
"""Policy to the action in the event and the log."""


LAG_STEPS = 4
"""Steps after which a number is read that comes from a GPU.

The ranks must act at the same step, so a number is read at a certain step and not when it has arrived. The host is
seldom more than two steps ahead, because the queue of a GPU holds about a thousand kernels: after four steps the number
is there. If not, the wait leaves the GPU four steps of queued work."""


class BadStep(TrainerError):
    """Ends the job: the next attempt would reach the same step."""


class RollBack(RuntimeError):
    """Ends this attempt only: the next one resumes from the newest checkpoint."""


@dataclass
class _Pending:
    """A step whose number is on its way from the device."""

    step: int
    value: torch.Tensor
    arrived: Any
    """CUDA event after the copy of `value` to the host."""
    epoch: int
    batch_idx: int
    losses: list[torch.Tensor]
    """Losses of its micro-batches on this rank."""


@dataclass(frozen=True)
class _Finding:
    """A bad step and what to do about it."""

    event: BadStepName
    policy: str
    reason: str
    step: int


class Guard(Callback):
    """Checks every optimizer step for non-finite numbers and for loss spikes."""

    def __init__(
        self,
        options: ResilienceOptions,
        directory: RunDirectory,
        attempt: int,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        """Create the guard of an attempt.

        Args:
            options: The section `resilience`.
            directory: Run directory, for events.
            attempt: Number of the attempt.
            group: CPU (gloo) group of all ranks; None for one rank.
        """
        self._policy, self._on_spike = options.on_nonfinite, options.on_spike
        self._spikes = None if options.spike_z is None else LossSpikes(options.spike_z)
        self._skips = self._policy == "skip" or (self._spikes is not None and self._on_spike == "skip")
        self._directory, self._attempt, self._group = directory, attempt, group
        self._record = StepRecord()
        self._pending: deque[_Pending] = deque()
        self._known_bad: set[int] = set()
        """Steps that were bad in an earlier attempt, and were rolled back."""
        self._sums = False
        """Whether the number is summed over the ranks."""
        self._num_ranks = 1
        self._by_loss = False
        """Whether losses are checked, because gradients are not accessible or are scaled."""
        self._checks_fast = False
        self._fast_checks: dict[int, FiniteGradientCheck] = {}
        """Checks by the identity of the optimizer."""
        self._clipping: ReportedClipping | None = None
        self._losses: list[torch.Tensor] = []
        """Losses of the step whose gradients are about to be clipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses, so that a resumed run detects the same spikes."""
        return {} if self._spikes is None else {"losses": list(self._spikes.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the recent losses."""
        if self._spikes is not None:
            self._spikes.losses.extend(state_dict.get("losses", []))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose how to check, and read the bad steps of earlier attempts from the events."""
        self._record = step_record_of(trainer)
        self._by_loss = _has_no_gradients(trainer)
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        self._sums = trainer.world_size > 1 and (sharded or self._by_loss or self._spikes is not None)
        self._num_ranks = trainer.world_size
        on_cpu = pl_module.device.type == "cpu"
        self._checks_fast = on_cpu and not (self._sums or self._by_loss or self._spikes)
        self._clipping = None if self._by_loss else reported_clipping(trainer, pl_module)
        if self._clipping is not None:
            self._clipping.listener = partial(self._on_norm, trainer, pl_module)
        known: list[Any] = [None]
        if trainer.is_global_zero:
            events = self._directory.events_of(BadStepEvent)
            known = [[event.step for event in events if event.attempt < self._attempt]]
        if self._group is not None:
            torch.distributed.broadcast_object_list(known, src=0, group=self._group)
        self._known_bad = set(known[0])

    @filled_by_lean_loop
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Record the loss of a micro-batch."""
        if not self._record.by_loop:
            loss, scaler = loss.detach(), getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:  # Lightning passes the scaled loss; scaling a 1 gives the factor
                loss = loss / scaler.scale(torch.ones_like(loss))
            self._record.losses.append(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Check the step, now or once its number has arrived from the device; or leave that to the clipping."""
        losses, self._record.losses = self._record.losses, []
        if self._clipping is not None and trainer.gradient_clip_val and clips_by_norm(trainer):
            self._losses = losses
            return
        if self._checks_fast:
            check = self._fast_checks.get(id(optimizer))
            if check is None:
                check = FiniteGradientCheck(optimizer, _only_ddp_sets_gradients(trainer, pl_module))
                self._fast_checks[id(optimizer)] = check
            if check.is_finite():
                return
        self._check(trainer, pl_module, optimizer, losses, None)

    def _on_norm(self, trainer: Trainer, module: LightningModule, optimizer: Any, total: torch.Tensor) -> None:
        """Check the step by the norm of its gradients, before they are clipped."""
        losses, self._losses = self._losses, []
        norm: torch.Tensor | None = total
        if self._checks_fast:
            if math.isfinite(total.item()):
                return
            norm = None  # the sum of squares may have overflowed
        self._check(trainer, module, optimizer, losses, norm)

    def _check(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: Any,
        losses: list[torch.Tensor],
        norm: torch.Tensor | None,
    ) -> None:
        """Check the step now, or note it to be checked once its number has arrived from the device."""
        value = self._value(optimizer, losses, norm)
        step = trainer.global_step + 1
        batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        pending = _Pending(step, value, None, trainer.current_epoch, batch_idx, losses)
        if not _is_on_device(value) or self._skips or step in self._known_bad:
            self._check_step(pending, trainer, module, optimizer)
        else:
            pending.value = value.to("cpu", non_blocking=True)  # into pinned memory
            pending.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            pending.arrived.record()
            self._pending.append(pending)
            self._read_pending(trainer, module, wait=False)

    def flush(self, trainer: Trainer) -> None:
        """Check all pending steps, before a save."""
        self._read_pending(trainer, trainer.lightning_module, wait=True)

    def _value(self, optimizer: Any, losses: list[torch.Tensor], norm: torch.Tensor | None = None) -> torch.Tensor:
        """Return a number that is not finite if anything of this step is not.

        If spikes are checked, the sum of the ranks' losses is a second element.

        Args:
            optimizer: The optimizer.
            losses: Losses of the micro-batches on this rank.
            norm: Norm of the gradients over all ranks, if it is known.
        """
        gradients = [] if self._by_loss or norm is not None else local_gradients(optimizer)
        if norm is not None:
            value = norm
        elif gradients:
            value = non_finite_flag(gradients) if gradients[0].device.type == "cpu" else sum_of_norms(gradients)
        elif losses:
            value = torch.stack(losses).sum()
        else:
            value = torch.zeros(())
        if self._spikes is not None and losses:
            # Each is its micro-batch's part of the step's mean.
            loss = torch.stack(losses).sum().float()
            # With fsdp's cpu_offload the gradients are in host memory, and the losses on the device.
            value = torch.stack([value.to(loss), loss])
        if self._sums and (norm is None or self._spikes is not None):
            value = value.float()
            torch.distributed.all_reduce(value)
        return value

    def _read_pending(self, trainer: Trainer, module: LightningModule, wait: bool) -> None:
        """Check the pending steps that are `LAG_STEPS` steps old, or at a save (`wait`) all of them."""
        while self._pending and (wait or len(self._pending) > LAG_STEPS):
            first = self._pending.popleft()
            if not first.arrived.query():
                first.arrived.synchronize()
            self._check_step(first, trainer, module, None)

    def _check_step(self, pending: _Pending, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        number, *losses = pending.value.reshape(-1).tolist()
        if not math.isfinite(number) and self._policy != "off":
            reason = self._describe(pending, trainer, module)
            self._act(_Finding("not_finite", self._policy, reason, pending.step), trainer, optimizer)
        elif self._spikes is not None and losses and math.isfinite(losses[0]):
            spike = self._spikes.check(losses[0] / self._num_ranks)
            if spike is not None:
                reason = f"step {pending.step}: {spike}; {self._samples(self._gather(pending, trainer, module))}"
                self._act(_Finding("loss_spike", self._on_spike, reason, pending.step), trainer, optimizer)

    def _act(self, bad: _Finding, trainer: Trainer, optimizer: Any) -> None:
        """Apply the policy. A step that is bad again after a rollback is skipped."""
        again = bad.step in self._known_bad
        skips = bad.policy == "skip" or (bad.policy == "rollback" and again)
        action = _ACTIONS["skip" if skips else bad.policy]
        if trainer.is_global_zero:
            self._directory.add_event(
                BadStepEvent(
                    event=bad.event, attempt=self._attempt, step=bad.step, reason=bad.reason, action=action, again=again
                )
            )
            print(f"{bad.reason}; {action}", flush=True)
        if skips:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        elif bad.policy == "rollback":
            raise RollBack(f"{bad.reason}; rolling back to the newest checkpoint")
        else:
            raise BadStep(
                bad.reason,
                "lower the learning rate, set trainer.gradient_clip_norm, inspect these samples, or choose"
                f" resilience.{_OPTIONS[bad.event]}=skip or rollback",
            )

    def _describe(self, pending: _Pending, trainer: Trainer, module: LightningModule) -> str:
        """Return which rank's loss, which parameter and which samples."""
        ranks = self._gather(pending, trainer, module)
        bad = [(rank, details) for rank, details in enumerate(ranks) if details["loss"] is not None]
        if bad:
            cause = "; ".join(
                f"the loss of rank {rank} is {details['loss']}, its samples are {_listed(details['ids'])}"
                for rank, details in bad
            )
        else:
            cause = f"the losses were finite; {self._samples(ranks)}"
        name = next((details["parameter"] for details in ranks if details["parameter"]), None)
        gradient = f"the gradient of {name} is not finite, and " if name else ""
        return f"step {pending.step}: {gradient}{cause}"

    def _samples(self, ranks: list[Any]) -> str:
        ids = [sample for details in ranks for sample in details["ids"] or []]
        return f"the samples of the step are {_listed(ids)}"

    def _gather(self, pending: _Pending, trainer: Trainer, module: LightningModule) -> list[Any]:
        """Gather the details of the step from every rank. Collective."""
        losses = [loss.item() for loss in pending.losses]
        mine = {
            "loss": next((loss for loss in losses if not math.isfinite(loss)), None),
            "parameter": None if self._by_loss else first_non_finite(module),
            "ids": _sample_ids(trainer, pending),
        }
        ranks: list[Any] = [mine]
        if self._group is not None:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, mine, group=self._group)
        return ranks


def _is_on_device(value: torch.Tensor) -> bool:
    """Return whether the host would have to wait to read the value."""
    return value.device.type != "cpu"


def _has_no_gradients(trainer: Trainer) -> bool:
    """Return whether gradients cannot be checked.

    DeepSpeed keeps them in its own buffers. A gradient scaler produces infinities, and skips those steps, by itself.
    """
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return (
        isinstance(trainer.strategy, DeepSpeedStrategy) or getattr(trainer.precision_plugin, "scaler", None) is not None
    )


def _only_ddp_sets_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether no other code can replace gradients between DDP's backward pass and the guard.

    DDP makes each gradient a view of a bucket in every backward pass.
    """
    names = ("on_after_backward", "on_before_optimizer_step")
    callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Guard)]  # type: ignore[attr-defined]
    return (
        isinstance(trainer.strategy.model, DistributedDataParallel)
        and module.automatic_optimization
        and not any(is_overridden(name, callback, Callback) for callback in callbacks for name in names)
        and not any(is_overridden(name, module, LightningModule) for name in (*names, "backward", "optimizer_step"))
        and not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())
    )


def _sample_ids(trainer: Trainer, pending: _Pending) -> list[int] | None:
    """Return this rank's sample ids in the step; None if `data/order.py` does not set their order."""
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(sampler, GlobalBatchSampler):
        return None
    first = pending.batch_idx - pending.batch_idx % trainer.accumulate_grad_batches
    batches = range(first, pending.batch_idx + 1)
    return [sample for batch in batches for sample in sampler.ids(pending.epoch, batch)]


def _listed(ids: list[int] | None) -> str:
    if not ids:
        return "not known (the data has its own loader or sampler)"
    shown = ", ".join(map(str, ids[:32]))
    return f"{shown} and {len(ids) - 32} more" if len(ids) > 32 else shown
