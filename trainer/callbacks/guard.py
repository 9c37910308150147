"""Stops, skips or rolls back at a loss that is a spike, or a loss or gradient that is not finite, before the update
can survive.

One number a step says whether all is well: the sum of the gradients' norms, on the CPU a flag (of the losses, where
the gradients are not to be had: DeepSpeed; or are scaled: 16-mixed). Data parallel ranks have equal gradients and need
not ask each other; where they are sharded the number is summed over the ranks, on the device. To find spikes the mean
loss of the step goes along as a second number, which always is summed.

On the CPU the number is read before the optimizer's step. On a GPU that would be a wait for the device on each
step: there it is read when it has arrived, and always before a checkpoint is written, so that what a bad update has
made of the weights is never saved; only `skip`, and a step that went bad before, wait for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.callbacks.spikes import Spikes
from trainer.config.schema import ResilienceOptions
from trainer.core.errors import TrainerError
from trainer.data.order import GlobalBatchSampler
from trainer.runs.directory import RunDirectory
from trainer.runs.events import BadStepEvent, BadStepName
from trainer.runtime.noted import Noted, noted_by_the_loop, noted_of

_DONE = {"stop": "stopped", "skip": "skipped", "rollback": "rolled back"}
"""A policy, and what it has done."""
_GRADIENT = attrgetter("grad")


class BadStep(TrainerError):
    """Ends the job: the next attempt would come to the same step."""


class RollBack(RuntimeError):
    """Ends this attempt only: the next one goes on from the newest checkpoint."""


@dataclass
class _Pending:
    """A step whose number is on its way from the device."""

    step: int
    value: torch.Tensor
    arrived: Any
    epoch: int
    batch_idx: int
    losses: list[torch.Tensor]
    """Of its micro-batches on this rank."""


class Guard(Callback):
    """`group` is the CPU (gloo) group; None for one rank."""

    def __init__(
        self,
        options: ResilienceOptions,
        directory: RunDirectory,
        attempt: int,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        self._policy, self._on_spike = options.on_nonfinite, options.on_spike
        self._spikes = None if options.spike_z is None else Spikes(options.spike_z)
        self._skips = self._policy == "skip" or (self._spikes is not None and self._on_spike == "skip")
        self._directory, self._attempt, self._group = directory, attempt, group
        self._noted = Noted()
        self._pending: deque[_Pending] = deque()
        self._known: set[int] = set()
        """Steps that went bad in an attempt before this one, and were rolled back."""
        self._sums = False
        self._ranks = 1
        self._by_loss = False
        self._looks_quickly = False
        self._quick: dict[int, QuickLook] = {}
        """By the identity of the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """So that a resumed run finds the same spikes."""
        return {} if self._spikes is None else {"losses": list(self._spikes.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._spikes is not None:
            self._spikes.losses.extend(state_dict.get("losses", []))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._noted = noted_of(trainer)
        self._by_loss = _has_no_gradients(trainer)
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        self._sums = trainer.world_size > 1 and (sharded or self._by_loss or self._spikes is not None)
        self._ranks = trainer.world_size
        on_cpu = pl_module.device.type == "cpu"
        self._looks_quickly = on_cpu and not (self._sums or self._by_loss or self._spikes)
        known: list[Any] = [None]
        if trainer.is_global_zero:
            events = self._directory.events_of(BadStepEvent)
            known = [[event.step for event in events if event.attempt < self._attempt]]
        if self._group is not None:
            torch.distributed.broadcast_object_list(known, src=0, group=self._group)
        self._known = set(known[0])

    @noted_by_the_loop
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if not self._noted.by_loop:
            loss, scaler = loss.detach(), getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:  # Lightning hands it out scaled; what one is scaled to is the factor
                loss = loss / scaler.scale(torch.ones_like(loss))
            self._noted.losses.append(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        losses, self._noted.losses = self._noted.losses, []
        if self._looks_quickly:
            quick = self._quick.get(id(optimizer))
            if quick is None:
                quick = QuickLook(optimizer, _only_ddp_sets_gradients(trainer, pl_module))
                self._quick[id(optimizer)] = quick
            if quick.is_finite():
                return
        value = self._value(optimizer, losses)
        step = trainer.global_step + 1
        batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        pending = _Pending(step, value, None, trainer.current_epoch, batch_idx, losses)
        if value.device.type == "cpu" or self._skips or step in self._known:
            self._judge(pending, trainer, pl_module, optimizer)
        else:
            pending.value = value.to("cpu", non_blocking=True)
            pending.arrived = torch.cuda.Event()
            pending.arrived.record()
            self._pending.append(pending)
            self._read(trainer, pl_module, wait=False)

    def flush(self, trainer: Trainer) -> None:
        """Before a save: what has not been read yet is read now."""
        self._read(trainer, trainer.lightning_module, wait=True)

    def _value(self, optimizer: Any, losses: list[torch.Tensor]) -> torch.Tensor:
        """[a number that is not finite when anything of this step is not], and where spikes are looked for the sum of
        the ranks' losses."""
        gradients = [] if self._by_loss else _gradients(optimizer)
        if gradients:
            value = _bad_on_cpu(gradients) if gradients[0].device.type == "cpu" else _sum_of_norms(gradients)
        elif losses:
            value = torch.stack(losses).sum()
        else:
            value = torch.zeros(())
        if self._spikes is not None and losses:
            # Each is its micro-batch's part of the step's mean.
            value = torch.stack([value.float(), torch.stack(losses).sum().float()])
        if self._sums:
            value = value.float()
            torch.distributed.all_reduce(value)
        return value

    def _read(self, trainer: Trainer, module: LightningModule, wait: bool) -> None:
        """The ranks must come to the same decision at the same step: only what has arrived on all of them, so at a
        save, or once it is a step old, which it is on each."""
        while self._pending and (wait or len(self._pending) > 1):
            first = self._pending.popleft()
            first.arrived.synchronize()
            self._judge(first, trainer, module, None)

    def _judge(self, pending: _Pending, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        number, *losses = pending.value.reshape(-1).tolist()
        if not math.isfinite(number) and self._policy != "off":
            self._act("not_finite", self._policy, self._describe(pending, trainer, module), pending, trainer, optimizer)
        elif self._spikes is not None and losses and math.isfinite(losses[0]):
            said = self._spikes.found(losses[0] / self._ranks)
            if said is not None:
                reason = f"step {pending.step}: {said}; {self._samples(self._everyone(pending, trainer, module))}"
                self._act("loss_spike", self._on_spike, reason, pending, trainer, optimizer)

    def _act(
        self, event: BadStepName, policy: str, reason: str, pending: _Pending, trainer: Trainer, optimizer: Any
    ) -> None:
        """Do what the policy says. A step that went bad again after a rollback is skipped."""
        again = pending.step in self._known
        skips = policy == "skip" or (policy == "rollback" and again)
        done = _DONE["skip" if skips else policy]
        if trainer.is_global_zero:
            self._directory.add_event(
                BadStepEvent(
                    event=event, attempt=self._attempt, step=pending.step, reason=reason, action=done, again=again
                )
            )
            print(f"{reason}; {done}", flush=True)
        if skips:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        elif policy == "rollback":
            raise RollBack(f"{reason}; going back to the newest checkpoint")
        else:
            option = "on_nonfinite" if event == "not_finite" else "on_spike"
            raise BadStep(
                reason,
                "lower the learning rate, set trainer.gradient_clip_norm, look at these samples, or choose"
                f" resilience.{option}=skip or rollback",
            )

    def _describe(self, pending: _Pending, trainer: Trainer, module: LightningModule) -> str:
        """Which rank's loss, which parameter, which samples."""
        everyone = self._everyone(pending, trainer, module)
        bad = [(rank, one) for rank, one in enumerate(everyone) if one["loss"] is not None]
        if bad:
            said = "; ".join(
                f"the loss of rank {rank} is {one['loss']}, its samples are {_listed(one['ids'])}" for rank, one in bad
            )
        else:
            said = f"the losses were finite; {self._samples(everyone)}"
        name = next((one["parameter"] for one in everyone if one["parameter"]), None)
        where = f"the gradient of {name} is not finite, and " if name else ""
        return f"step {pending.step}: {where}{said}"

    def _samples(self, everyone: list[Any]) -> str:
        ids = [identity for one in everyone for identity in one["ids"] or []]
        return f"the samples of the step are {_listed(ids)}"

    def _everyone(self, pending: _Pending, trainer: Trainer, module: LightningModule) -> list[Any]:
        """What each rank knows of the step; the ranks tell each other."""
        losses = [loss.item() for loss in pending.losses]
        mine = {
            "loss": next((loss for loss in losses if not math.isfinite(loss)), None),
            "parameter": None if self._by_loss else _first_bad(module),
            "ids": _sample_ids(trainer, pending),
        }
        everyone: list[Any] = [mine]
        if self._group is not None:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine, group=self._group)
        return everyone


def _has_no_gradients(trainer: Trainer) -> bool:
    """DeepSpeed keeps them in buffers of its own; a gradient scaler makes infinities, and skips them, by itself."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return (
        isinstance(trainer.strategy, DeepSpeedStrategy) or getattr(trainer.precision_plugin, "scaler", None) is not None
    )


def _gradients(optimizer: Any) -> list[torch.Tensor]:
    """What this rank holds of them."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                numbers = _numbers(parameter.grad)
                if numbers.numel():
                    found.append(numbers)
    return found


def _numbers(gradient: torch.Tensor) -> torch.Tensor:
    """The real numbers of this rank's part of a gradient, of whatever layout it is."""
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    if gradient.is_sparse:
        gradient = gradient._values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _sum_of_norms(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(torch._foreach_norm(gradients)).sum()


class QuickLook:
    """Says that all gradients are finite, where they are on the CPU and this rank need not ask the others.

    After a backward pass nothing of this is in the caches, and each question to a tensor is 1 us: what lies where is
    asked once. Under DDP the gradients are views of its buckets, and one number is asked of each. Elsewhere a sum reads
    only and is four times as quick as the check of the gradient scalers, which writes too, but costs a few us a tensor
    and 40 us for the first, whose code is in no cache either: it pays for tensors of `LARGE` elements that have `WORTH`
    of them together.

    `only_ddp`: nobody else can have put a gradient elsewhere, so one of each bucket tells whether it is still in use.
    """

    LARGE, WORTH = 2**15, 2**18

    def __init__(self, optimizer: Any, only_ddp: bool = False) -> None:
        self._optimizer = optimizer
        self._only_ddp = only_ddp
        self._found, self._one = torch.zeros(()), torch.ones(())
        self._looks: list[Callable[[], torch.Tensor]] = []
        """One for each bucket."""
        self._watched: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []
        """The gradients of `_watched`."""
        self._small: list[torch.Tensor] = []
        self._summed: list[torch.Tensor] = []
        self._counted = -1

    def is_finite(self) -> bool:
        """False also where a sum overflows: the caller then looks closely."""
        counted = 0
        for group in self._optimizer.param_groups:
            counted += len(group["params"])
        if counted != self._counted or (self._views and not all(map(is_, map(_GRADIENT, self._watched), self._views))):
            self._sort()
        for look in self._looks:
            if not math.isfinite(look().item()):
                return False
        for parameter in self._summed:
            if parameter.grad is not None and not math.isfinite(abs(parameter.grad.sum().item())):
                return False
        if self._small:
            self._check(list(map(_GRADIENT, self._small)))
            if self._found.item():
                self._found.zero_()
                return False
        return True

    def _check(self, gradients: list[Any]) -> None:
        """Set `_found` where one is not finite; parameters without a gradient are rare enough for an exception."""
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._found, self._one)
        except TypeError:
            if some := [gradient for gradient in gradients if gradient is not None]:
                torch._amp_foreach_non_finite_check_and_unscale_(some, self._found, self._one)

    def _sort(self) -> None:
        """A sum takes every layout and type; of a parameter without a gradient yet neither is known."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        self._counted = len(parameters)
        found = _buckets([parameter for parameter in parameters if _is_plain(parameter.grad)])
        self._looks = [_look_at(bucket) for bucket, _ in found]
        self._watched = [parameter for _, inside in found for parameter in (inside[:1] if self._only_ddp else inside)]
        self._views = [view for parameter in self._watched if (view := parameter.grad) is not None]
        in_buckets = {parameter for _, inside in found for parameter in inside}
        parameters = [parameter for parameter in parameters if parameter not in in_buckets]
        large = {parameter for parameter in parameters if parameter.numel() >= self.LARGE}
        if sum(parameter.numel() for parameter in large) < self.WORTH:
            large.clear()
        self._small, self._summed = [], []
        for parameter in parameters:
            looked_at_together = _is_plain(parameter.grad) and parameter.numel() and parameter not in large
            (self._small if looked_at_together else self._summed).append(parameter)


def _look_at(bucket: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What gives a number that is not finite when one of the bucket is not. A dot product runs through less code than a
    sum: 55 us for 70 with none of it in a cache. In float16 the squares of gradients would overflow."""
    return partial(bucket.dot, bucket) if bucket.dtype == torch.float32 else bucket.sum


def _is_plain(gradient: torch.Tensor | None) -> bool:
    return not (gradient is None or isinstance(gradient, DTensor) or gradient.is_sparse or gradient.is_complex())


def _only_ddp_sets_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Whether no code of others runs between DDP, which makes each gradient a view of a bucket in every backward pass,
    and the guard."""
    names = ("on_after_backward", "on_before_optimizer_step")
    callbacks = [one for one in trainer.callbacks if not isinstance(one, Guard)]  # type: ignore[attr-defined]
    return (
        isinstance(trainer.strategy.model, DistributedDataParallel)
        and module.automatic_optimization
        and not any(is_overridden(name, one, Callback) for one in callbacks for name in names)
        and not any(is_overridden(name, module, LightningModule) for name in (*names, "backward", "optimizer_step"))
        and not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())
    )


def _buckets(parameters: list[torch.Tensor]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Each memory that the gradients of several parameters fill without gaps, as a flat tensor; those parameters."""
    sharing: dict[tuple[int, torch.dtype], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        place = int(gradient.storage_offset()), gradient, parameter
        sharing.setdefault((gradient.untyped_storage().data_ptr(), gradient.dtype), []).append(place)
    found = []
    for places in sharing.values():
        end = 0
        for start, gradient, _ in sorted(places, key=itemgetter(0)):
            end = end + gradient.numel() if start == end else -1
        first = places[0][1]
        if len(places) > 1 and end * first.itemsize == first.untyped_storage().nbytes():
            found.append((first.as_strided((end,), (1,), 0), [parameter for _, _, parameter in places]))
    return found


def _bad_on_cpu(gradients: list[torch.Tensor]) -> torch.Tensor:
    """0, or infinite if any of them is not finite: half the time of the norms, by the check of the gradient scalers
    (which multiplies by a scale: 1 leaves every bit as it was)."""
    found = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones(()))
    return found.atanh_()


def _first_bad(module: LightningModule) -> str | None:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(_numbers(parameter.grad)).all()):
            return name
    return None


def _sample_ids(trainer: Trainer, pending: _Pending) -> list[int] | None:
    """This rank's, where the order of the samples is ours (`trainer/data/order.py`)."""
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(sampler, GlobalBatchSampler):
        return None
    first = pending.batch_idx - pending.batch_idx % trainer.accumulate_grad_batches
    batches = range(first, pending.batch_idx + 1)
    return [identity for batch in batches for identity in sampler.ids(pending.epoch, batch)]


def _listed(ids: list[int] | None) -> str:
    if not ids:
        return "not known (the loader is not ours)"
    shown = ", ".join(map(str, ids[:32]))
    return f"{shown} and {len(ids) - 32} more" if len(ids) > 32 else shown
