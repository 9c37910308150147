"""Records a few steps of one rank: a trace for Perfetto, the history of GPU memory, or ranges for Nsight Systems.

Lightning's profilers (`simple`, `advanced`, `pytorch`) time every hook of the whole training and need Lightning's own
loop. These record a window of steps and leave the loop and all other steps as they are.
"""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from trainer.runtime.steps import Steps, steps_of

MEMORY_EVENTS = 100_000
"""Allocations and frees that a memory history keeps, the latest; each takes some KB of host memory with its stack."""


class Recorder(Protocol):
    """A way of recording a window of steps."""

    warmup: int
    """Steps before the window in which it already runs without recording."""

    def start(self) -> None:
        """Start, before the first step of the warm-up."""

    def step(self) -> None:
        """Mark the end of a step."""

    def push(self, name: str) -> None:
        """Open a named range."""

    def pop(self) -> None:
        """Close the innermost range."""

    def stop(self) -> str:
        """Stop; returns what was written and where, for the log."""


class TorchTrace:
    """A trace of the CPU and the GPU by `torch.profiler`, which https://ui.perfetto.dev reads.

    Args:
        path: File that is written: `.json.gz`.
        steps: Steps to record.
        warmup: Steps before them in which the profiler runs without recording: its first steps are slow.
    """

    def __init__(self, path: Path, steps: int, warmup: int) -> None:
        self.warmup = warmup
        self._path, self._steps = path, steps
        self._ranges: list[AbstractContextManager[Any]] = []
        self._has_written = False

    def start(self) -> None:
        """Start with the warm-up."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=self.warmup, active=self._steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
        self._profile.start()

    def step(self) -> None:
        """Continue with the schedule, which writes the trace after its last step."""
        self._profile.step()

    def push(self, name: str) -> None:
        """Open a range."""
        self._ranges.append(record_function(name))
        self._ranges[-1].__enter__()

    def pop(self) -> None:
        """Close the innermost range."""
        self._ranges.pop().__exit__(None, None, None)

    def stop(self) -> str:
        """Stop, and write the trace if the training ended inside the window."""
        self._profile.stop()
        if not self._has_written:
            return "the training ended in the warm-up of the profiler: no trace"
        return f"trace for https://ui.perfetto.dev: {self._path}"

    def _write(self, finished: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._path))
        self._has_written = True


class MemoryHistory:
    """Each allocation of the window and the stack that made it, for https://docs.pytorch.org/memory_viz.

    Blocks that are older than the window are in the snapshot without a stack.

    Args:
        path: File that is written: `.pickle`.
    """

    warmup = 0

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self) -> None:
        """Record from here on."""
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)

    def step(self) -> None:
        """Do nothing."""

    def push(self, name: str) -> None:
        """Do nothing: the history has no ranges."""

    def pop(self) -> None:
        """Do nothing."""

    def stop(self) -> str:
        """Write the snapshot and stop recording."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self._path))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)
        return f"memory history for https://docs.pytorch.org/memory_viz: {self._path}"


class NsightRanges:
    """NVTX ranges of steps and operators, and the start and end of the window for `nsys -c cudaProfilerApi`."""

    warmup = 0

    def start(self) -> None:
        """Start the capture of Nsight Systems and the ranges of operators."""
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        self._operators: Any = torch.autograd.profiler.emit_nvtx()  # type: ignore[no-untyped-call]
        self._operators.__enter__()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Mark the end of a step."""
        torch.cuda.nvtx.mark("step")  # type: ignore[no-untyped-call]

    def push(self, name: str) -> None:
        """Open a range."""
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]

    def pop(self) -> None:
        """Close the innermost range."""
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def stop(self) -> str:
        """End the capture."""
        self._operators.__exit__(None, None, None)
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
        return "capture for Nsight Systems ended"


def make_recorder(kind: str, folder: Path, attempt: int, rank: int, *, after: int, steps: int) -> tuple[Recorder, str]:
    """Return the recorder of `trainer.profiler`, and what it writes, for the log of rank 0.

    Args:
        kind: `torch`, `memory` or `nsys`.
        folder: Folder of the files.
        attempt: Number of the attempt.
        rank: The rank that is recorded.
        after: Steps of the attempt before the window.
        steps: Steps of the window.
    """
    name = f"attempt-{attempt:02d}-rank-{rank}"
    if kind == "torch":
        path = folder / f"trace-{name}.json.gz"
        return TorchTrace(path, steps, warmup=min(1, after)), str(path)
    if kind == "memory":
        path = folder / f"memory-{name}.pickle"
        return MemoryHistory(path), str(path)
    return NsightRanges(), "the report of nsys"


class ProfileWindow(Callback):
    """Records `steps` optimizer steps of this rank after the first `after` steps of the attempt.

    Outside of the window a batch costs one comparison. Writing takes seconds, in which the other ranks wait.

    Args:
        recorder: What records.
        after: Steps of the attempt before the window.
        steps: Steps of the window.
    """

    read_only = True
    """Hooks change nothing in place, so the loop need not copy the loss for them (`train/loop_plan.py`)."""

    def __init__(self, recorder: Recorder, after: int, steps: int) -> None:
        self._recorder, self._after, self._num_steps = recorder, after, steps
        self._state: Literal["before", "recording", "done"] = "before"
        self._depth = 0
        self._steps: Steps
        self._first = 0
        """Step of the attempt's start."""
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the window, and start if it begins with the first step."""
        self._steps = steps_of(trainer)
        self._first = self._last_step = self._steps.completed
        self._start_if_due()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the forward pass."""
        if self._state == "recording":
            self._pop_all()
            self._push("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """End the forward pass."""
        if self._state == "recording":
            self._pop_all()
            self._push("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the backward pass."""
        if self._state == "recording":
            self._pop_all()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Begin the optimizer step."""
        if self._state == "recording":
            self._pop_all()
            self._push("optimizer step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start or end the window if this batch completed a step."""
        if self._state == "done":
            return
        step = self._steps.completed
        if self._state == "recording":
            self._pop_all()
            if step > self._last_step:
                self._recorder.step()
            if step - self._first >= self._after + self._num_steps:
                self._stop()
            else:
                self._push("data, callbacks")
        else:
            self._start_if_due()
        self._last_step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a window that the training did not complete."""
        if self._state == "recording":
            self._pop_all()
            self._stop()
        elif self._state == "before":
            self._state = "done"
            print(f"nothing was profiled: this attempt had no more than {self._after} steps", flush=True)

    def _start_if_due(self) -> None:
        if self._steps.completed - self._first >= self._after - self._recorder.warmup:
            self._state = "recording"
            self._recorder.start()

    def _stop(self) -> None:
        self._state = "done"
        started = time.monotonic()
        print(f"{self._recorder.stop()} ({time.monotonic() - started:.1f} s)", flush=True)

    def _push(self, name: str) -> None:
        self._recorder.push(name)
        self._depth += 1

    def _pop_all(self) -> None:
        for _ in range(self._depth):
            self._recorder.pop()
        self._depth = 0
