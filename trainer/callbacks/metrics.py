"""Training metrics on logged steps: the loss of the whole global batch, the learning rate, the rate of work."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer

from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.steps import has_optimizer

SAY_EVERY_S = 1.0
"""Lines of progress in the log: steps of a millisecond would make a hundred of them a second."""


class TrainMetrics:
    """A `StepListener`: every `every_n_steps` it averages over micro-batches and ranks, and writes to every logger.

    Where several steps come at once (manual optimization), it writes at the first that is due or past it.

    `batch_size`: samples of a batch as Lightning counts batches (a micro-batch), over all ranks. `group` is the CPU
    (gloo) group; None for one rank. `tokens_per_sample` makes tokens/s of samples/s.
    """

    def __init__(
        self,
        every_n_steps: int,
        batch_size: float,
        tokens_per_sample: int | None,
        max_steps: int | None,
        heartbeat: Heartbeat,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.next_step = 0
        self._work_per_batch = batch_size * (tokens_per_sample or 1)
        self._unit = "tokens/s" if tokens_per_sample else "samples/s"
        self._max_steps = max_steps
        self._heartbeat = heartbeat
        self._group = group
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last: tuple[int, int, float] | None = None
        """Step, batches and seconds when it was logged last."""
        self._said = -math.inf
        self._paused_s = 0.0
        self._pause_started = 0.0

    def start(self, trainer: Trainer, step: int) -> None:
        """Training starts after `step` steps."""
        self.next_step = step + self.every_n_steps - step % self.every_n_steps
        self._last = (step, _batches(trainer), time.monotonic())

    def pause(self) -> None:
        """Time until `resume` is not the training's: validation, saving."""
        self._pause_started = time.monotonic()

    def resume(self) -> None:
        self._paused_s += time.monotonic() - self._pause_started

    def on_output(self, module: LightningModule, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        # Lightning hands it out divided by the number of micro-batches (closure of _AutomaticOptimization).
        accumulate = module.trainer.accumulate_grad_batches
        found = {}
        if loss is not None:
            found["loss"] = loss if accumulate == 1 else loss * accumulate
        found.update(getattr(module, "step_metrics", None) or {})
        for name, value in found.items():
            value = value.detach().float()
            if value.numel() != 1:  # manual optimization may return any tensor
                value = value.mean()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self.next_step = step + self.every_n_steps - step % self.every_n_steps
        values = self._averages()
        if has_optimizer(trainer):
            values["train/lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        rate, left_s = self._rate(trainer, step)
        if rate is not None:
            values[f"train/{self._unit.replace('/', '_per_')}"] = rate
        self._show(values, rate, left_s, step, trainer.is_global_zero)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)

    def _averages(self) -> dict[str, float]:
        """Mean over the micro-batches of this step and over the ranks, by one all-reduce on the CPU."""
        names = sorted(self._sums)
        if not names:
            return {}
        parts = [self._sums[name] / self._counts[name] for name in names]
        # One wait for the device; on the CPU there is none to save.
        values = (
            [part.item() for part in parts]
            if parts[0].device.type == "cpu"
            else torch.stack([part.reshape(()) for part in parts]).tolist()
        )
        if self._group is not None:
            means = torch.tensor(values, dtype=torch.float64)
            torch.distributed.all_reduce(means, group=self._group)
            values = (means / torch.distributed.get_world_size(self._group)).tolist()
        self._sums.clear()
        self._counts.clear()
        return {f"train/{name}": value for name, value in zip(names, values, strict=True)}

    def _rate(self, trainer: Trainer, step: int) -> tuple[float | None, float | None]:
        """Work a second since the last logged step, without validation and saving; seconds left at this rate."""
        now, batches = time.monotonic(), _batches(trainer)
        assert self._last is not None
        step_before, batches_before, then = self._last
        elapsed_s = now - then - self._paused_s
        self._last, self._paused_s = (step, batches, now), 0.0
        if elapsed_s <= 0:
            return None, None
        left_s = None
        if self._max_steps is not None and step > step_before:
            left_s = max(0, self._max_steps - step) * elapsed_s / (step - step_before)
        return (batches - batches_before) * self._work_per_batch / elapsed_s, left_s

    def _show(self, values: dict[str, float], rate: float | None, left_s: float | None, step: int, say: bool) -> None:
        self._heartbeat.update(step=step, metrics=values, rate=rate, rate_unit=self._unit, eta_s=left_s)
        now = time.monotonic()
        if say and (now - self._said >= SAY_EVERY_S or step == self._max_steps):
            self._said = now
            print(progress_line(step, self._max_steps, values, rate, self._unit, left_s), flush=True)


def _batches(trainer: Trainer) -> int:
    """Trained on so far, or being trained on."""
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.ready)


def progress_line(
    step: int,
    max_steps: int | None,
    values: dict[str, float],
    rate: float | None,
    unit: str,
    left_s: float | None,
) -> str:
    """`step 40/400  loss 0.4321  1,234 samples/s  0:03:20 left`."""
    parts = [f"step {step}/{max_steps}" if max_steps else f"step {step}"]
    if "train/loss" in values:
        parts.append(f"loss {values['train/loss']:.4f}")
    if rate is not None:
        parts.append(f"{rate:,.0f} {unit}")
    if left_s is not None:
        minutes, seconds = divmod(round(left_s), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return "  ".join(parts)
