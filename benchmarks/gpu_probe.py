"""Measures a training from a callback, for `benchmarks/gpu`, which copies this file into the project that it trains.

Optimizer steps, in this order: `warmup`; `timed`, undisturbed; `watched`, in which waits of the host are counted; four
for the trainer's own profiler; `synchronized`, each timed alone, in one of which a checkpoint is saved.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.models.transformer import Transformer

PROFILED = 4
"""Steps of the trainer's profiler: one before it starts, a warm-up, and two that it records."""
GIGABYTE = 1e9


class Drawn(Transformer):
    """A Transformer whose weights are drawn on its device as training starts: 8B take a minute on the CPU.

    The trainer itself draws them before; how long that takes is not what is measured here.
    """

    def __init__(self, **arguments: Any) -> None:
        with torch.device("meta"):
            super().__init__(**arguments)
        self.to_empty(device="cpu")
        self.tie()


class Probe(Callback):
    """Writes what it measured to `out` as JSON.

    Args:
        out: The file.
        tokens: Tokens of an optimizer step.
        warmup: Steps that are not measured.
        timed: Steps that are timed together.
        watched: Steps in which waits of the host are counted.
        synchronized: Steps that are timed one by one.
        saves_after: Optimizer step after which a checkpoint is saved; None: no save is measured.
        leaves: End the process after the last measurement, without a final checkpoint.
    """

    read_only = True

    def __init__(
        self,
        out: str,
        tokens: int,
        warmup: int,
        timed: int,
        watched: int,
        synchronized: int,
        saves_after: int | None = None,
        leaves: bool = False,
    ) -> None:
        self.out, self.tokens, self.leaves, self.saves_after = Path(out), tokens, leaves, saves_after
        self.warmed = warmup
        self.timed_until = warmup + timed
        self.watched_until = self.timed_until + watched
        self.alone_from = self.watched_until + PROFILED + 1
        self.until = self.alone_from + synchronized
        self.facts: dict[str, Any] = {}
        self.completed = -1
        self.alone: dict[int, float] = {}
        self.waits: dict[int, Counter[str]] = {}
        self.watch: Waits | None = None
        self.began = (0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the training."""
        model: Any = pl_module.model
        if isinstance(model, Drawn):
            model.init_weights()
        self.accumulate = trainer.accumulate_grad_batches
        self.facts |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_per_token": model.flops_per_token(trainer.datamodule.facts()["sequence_length"]),  # type: ignore[attr-defined]
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "optimizer": {
                key: trainer.optimizers[0].defaults.get(key) for key in ("fused", "foreach", "betas", "weight_decay")
            }
            | {"class": type(trainer.optimizers[0]).__name__},
            "start_s": time.time() - float(os.environ["GPU_BENCHMARK_BEGAN"]),
        }
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin an optimizer step."""
        if batch_idx % self.accumulate:
            return
        self.completed += 1
        now = self.completed
        if self.watch is not None:
            self.waits[now] = self.watch.take()
        if now == self.watched_until and self.watch is not None:
            self.watch.stop()
            self.watch = None
        if now in (0, 1, self.warmed, self.timed_until) or now >= self.alone_from:
            self._at_border(now)

    def _at_border(self, now: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        at, cpu = time.perf_counter(), time.thread_time()
        if now == 1:
            self.facts["first_step_s"] = at - self.began[0]
        if now == self.timed_until:
            self._summarise(at - self.began[0], cpu - self.began[1])
            self.watch = Waits()
        if now > self.alone_from:
            self.alone[now] = at - self.began[0]
        if now == self.until:
            self._write()
        self.began = time.perf_counter(), cpu

    def _summarise(self, seconds: float, cpu_s: float) -> None:
        steps = self.timed_until - self.warmed
        self.facts |= {
            "tokens_per_s": self.tokens * steps / seconds,
            "step_ms": 1e3 * seconds / steps,
            "host_cpu_ms": 1e3 * cpu_s / steps,
        }
        if torch.cuda.is_available():
            self.facts |= {
                "peak_allocated_gb": torch.cuda.max_memory_allocated() / GIGABYTE,
                "peak_reserved_gb": torch.cuda.max_memory_reserved() / GIGABYTE,
                "allocator_retries": torch.cuda.memory_stats().get("num_alloc_retries"),
            }

    def _write(self) -> None:
        self.facts["waits"] = {step: dict(found) for step, found in self.waits.items()}
        others = [seconds for step, seconds in self.alone.items() if step != self.saves_after]
        if self.saves_after in self.alone and others:
            self.facts["save_stall_ms"] = 1e3 * (self.alone[self.saves_after] - statistics.median(others))
        self.out.write_text(json.dumps(self.facts, indent=1, default=str))
        if self.leaves:
            os._exit(0)


class Waits:
    """Counts what makes the host wait for the device: what torch reports, and what Python code asks for.

    torch's sync debug mode warns of reads of a value (`item`, `nonzero`, copies to pageable memory); `synchronize` of
    events, streams and devices is counted by wrapping them.
    """

    def __init__(self) -> None:
        self._found: Counter[str] = Counter()
        self._restore: list[Callable[[], None]] = []
        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._on_warning  # type: ignore[assignment]
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda):
                self._wrap(owner)

    def _on_warning(self, message: Any, category: type, filename: str, line: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            self._found[_place(filename, line)] += 1

    def _wrap(self, owner: Any) -> None:
        original = owner.synchronize

        def counted(*arguments: Any, **named: Any) -> Any:
            caller = sys._getframe(1)
            self._found[f"{_place(caller.f_code.co_filename, caller.f_lineno)} {owner.__name__}.synchronize"] += 1
            return original(*arguments, **named)

        owner.synchronize = counted
        self._restore.append(lambda: setattr(owner, "synchronize", original))

    def take(self) -> Counter[str]:
        """Return what was counted since the last call."""
        found, self._found = self._found, Counter()
        return found

    def stop(self) -> None:
        """End counting."""
        self._catcher.__exit__(None, None, None)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        for restore in self._restore:
            restore()


def _place(filename: str, line: int) -> str:
    path = Path(filename)
    return f"{path.parent.name}/{path.name}:{line}"
