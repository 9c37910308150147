"""Training metrics on logged steps: loss of the whole global batch, learning rate, throughput."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer

from trainer.callbacks.gpu_metrics import GpuMetrics
from trainer.callbacks.node_metrics import NodeMetrics
from trainer.runtime import cpu_groups
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.steps import has_optimizer

PRINT_EVERY_S = 1.0
"""Seconds between progress lines in the log: steps of a millisecond would otherwise log a hundred lines a second."""


@dataclass(frozen=True)
class BatchWork:
    """Work in one batch, over all ranks, as the numerator of the throughput."""

    samples: float
    """Samples of a batch as Lightning counts batches: a micro-batch on each rank."""
    tokens_per_sample: int | None = None
    """Length of a sequence; None: throughput is reported in samples, not in tokens."""

    @property
    def unit(self) -> str:
        """Unit of the throughput."""
        return "tokens/s" if self.tokens_per_sample else "samples/s"

    @property
    def amount(self) -> float:
        """Tokens or samples in a batch."""
        return self.samples * (self.tokens_per_sample or 1)


@dataclass(frozen=True)
class Progress:
    """Progress after a logged step."""

    step: int
    max_steps: int | None
    metrics: dict[str, float]
    rate: float | None
    """Throughput in `unit`; None: not measured yet."""
    unit: str
    eta_s: float | None
    """Seconds left at this rate; None: not known."""

    def line(self) -> str:
        """Return the line for the log: `step 40/400  loss 0.4321  1,234 samples/s  41.2% MFU  0:03:20 left`."""
        parts = [f"step {self.step}/{self.max_steps}" if self.max_steps else f"step {self.step}"]
        if "train/loss" in self.metrics:
            parts.append(f"loss {self.metrics['train/loss']:.4f}")
        if self.rate is not None:
            parts.append(f"{self.rate:,.0f} {self.unit}")
        if "train/mfu" in self.metrics:
            parts.append(f"{self.metrics['train/mfu']:.1%} MFU")
        if self.eta_s is not None:
            minutes, seconds = divmod(round(self.eta_s), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
        return "  ".join(parts)


class TrainMetrics:
    """Averages metrics over micro-batches and ranks every `every_n_steps`, and writes them to every logger.

    `StepClock` calls it at the steps that it requests. If several steps complete at once (manual optimization), it
    writes at the first one that is due or past due.
    """

    def __init__(
        self,
        every_n_steps: int,
        work: BatchWork,
        max_steps: int | None,
        heartbeat: Heartbeat,
        group: torch.distributed.ProcessGroup | None,
        *,
        gpus: GpuMetrics | None = None,
        nodes: NodeMetrics | None = None,
    ) -> None:
        """Create the metrics of an attempt.

        Args:
            every_n_steps: Optimizer steps between two logged steps.
            work: Work in one batch, for the throughput.
            max_steps: Optimizer steps of the whole training; None: not known.
            heartbeat: The heartbeat of this rank, which also gets the metrics.
            group: CPU (gloo) group of all ranks; None for one rank.
            gpus: Memory, utilization and power of the GPUs; None on CPU.
            nodes: Load of each node; None: there is one.
        """
        self.every_n_steps = every_n_steps
        self.next_step = 0
        self._work = work
        self._max_steps = max_steps
        self._heartbeat = heartbeat
        self._group = group
        self._gpus, self._nodes = gpus, nodes
        self.peak_s_per_sample: float | None = None
        """Seconds in which all devices together would do the FLOPs of a sample at their peak rate; None: no MFU."""
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last: tuple[int, int, float] | None = None
        """Step, batches and time of the last logged step."""
        self._printed_at = -math.inf
        self._paused_s = 0.0
        self._pause_started = 0.0

    def start(self, trainer: Trainer, step: int) -> None:
        """Start measuring; `step` optimizer steps have been completed."""
        self.next_step = step + self.every_n_steps - step % self.every_n_steps
        self._last = (step, _num_batches(trainer), time.monotonic())

    def pause(self) -> None:
        """Exclude the time until `resume` from the throughput: validation, saving."""
        self._pause_started = time.monotonic()

    def resume(self) -> None:
        """End a pause."""
        self._paused_s += time.monotonic() - self._pause_started

    def on_output(self, module: LightningModule, outputs: Any) -> None:
        """Add the outputs of a micro-batch of a logged step."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        # Lightning hands it out divided by the number of micro-batches (closure of _AutomaticOptimization).
        accumulate = module.trainer.accumulate_grad_batches
        values = {}
        if loss is not None:
            values["loss"] = loss if accumulate == 1 else loss * accumulate
        values.update(getattr(module, "step_metrics", None) or {})
        for name, value in values.items():
            if value.requires_grad:
                value = value.detach()
            if value.dtype is not torch.float32:
                value = value.float()
            if value.numel() != 1:  # manual optimization may return any tensor
                value = value.mean()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log the averages of this step."""
        self.next_step = step + self.every_n_steps - step % self.every_n_steps
        values = self._reduced()
        if has_optimizer(trainer):
            values["train/lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        rate, eta_s = self._measure_rate(trainer, step)
        if rate is not None:
            values.update(self._rates(rate))
        self._report(Progress(step, self._max_steps, values, rate, self._work.unit, eta_s), trainer.is_global_zero)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)

    def _reduced(self) -> dict[str, float]:
        """Return what is known only over all ranks: averages, and the load of GPUs and nodes."""
        own = self._gpus.loads() if self._gpus else []
        values, loads = self._averages([*own, *(self._nodes.loads(own) if self._nodes else ())])
        if self._gpus:
            values.update(self._gpus.metrics(loads[: len(own)], self._group))
        if self._nodes:
            values.update(self._nodes.metrics(loads[len(own) :]))
        return values

    def _rates(self, rate: float) -> dict[str, float]:
        """Return the throughput in tokens, if a sample has them, and in samples, and the MFU if it is known."""
        samples_per_s = rate / (self._work.tokens_per_sample or 1)
        rates = {"train/samples_per_s": samples_per_s}
        if self._work.tokens_per_sample:
            rates["train/tokens_per_s"] = rate
        if self.peak_s_per_sample is not None:
            rates["train/mfu"] = samples_per_s * self.peak_s_per_sample
        return rates

    def _averages(self, loads: Sequence[float] = ()) -> tuple[dict[str, float], list[float]]:
        """Return means over the micro-batches of this step and over the ranks, with one all-reduce on the CPU.

        Args:
            loads: Further numbers of this rank, whose means over the ranks are returned as well.
        """
        names = sorted(self._sums)
        if not names and not loads:
            return {}, []
        means = [
            self._sums[name] if self._counts[name] == 1 else self._sums[name] / self._counts[name] for name in names
        ]
        # One wait for the device; on the CPU there is none to save.
        values = (
            [mean.item() for mean in means]
            if not means or means[0].device.type == "cpu"
            else torch.stack([mean.reshape(()) for mean in means]).tolist()
        )
        values = [*values, *loads]
        if self._group is not None:
            reduced = torch.tensor(values, dtype=torch.float64)
            cpu_groups.all_reduce(reduced, torch.distributed.ReduceOp.SUM, self._group)
            values = (reduced / torch.distributed.get_world_size(self._group)).tolist()
        self._sums.clear()
        self._counts.clear()
        return {f"train/{name}": values[index] for index, name in enumerate(names)}, values[len(names) :]

    def _measure_rate(self, trainer: Trainer, step: int) -> tuple[float | None, float | None]:
        """Return the throughput since the last logged step, without validation and saving, and the seconds left."""
        now, batches = time.monotonic(), _num_batches(trainer)
        assert self._last is not None
        last_step, last_batches, last_time = self._last
        elapsed_s = now - last_time - self._paused_s
        self._last, self._paused_s = (step, batches, now), 0.0
        if elapsed_s <= 0:
            return None, None
        eta_s = None
        if self._max_steps is not None and step > last_step:
            eta_s = max(0, self._max_steps - step) * elapsed_s / (step - last_step)
        return (batches - last_batches) * self._work.amount / elapsed_s, eta_s

    def _report(self, progress: Progress, prints: bool) -> None:
        """Update the heartbeat and, if this rank `prints`, the log."""
        self._heartbeat.update(
            step=progress.step,
            metrics=progress.metrics,
            rate=progress.rate,
            rate_unit=progress.unit,
            eta_s=progress.eta_s,
        )
        now = time.monotonic()
        if prints and (now - self._printed_at >= PRINT_EVERY_S or progress.step == self._max_steps):
            self._printed_at = now
            print(progress.line(), flush=True)


def _num_batches(trainer: Trainer) -> int:
    """Return the batches trained on so far, the current one included."""
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.ready)
