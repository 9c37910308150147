"""A callback that injects faults into a training, for `trainer bench faults`, `trainer verify-resume` and the tests."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.core import processes
from trainer.runtime.process import Rank
from trainer.tracking.metrics_file import run_folder


class InjectFault(Callback):
    """A callback that injects one fault, once.

    Args:
        kind: The fault, a key of `_ACTIONS`.
        step: The fault happens at the first batch after this optimizer step.
        ranks: The ranks that it happens on; empty: all ranks.
        delay_s: Seconds. A fault that kills happens this much later, from a thread, so at any place inside a step.
            `slow` waits this long in the step and in each later one, in every attempt. `clock` sets the clock of the
            process forward by it.
        attempt: The attempt in which it happens.
    """

    def __init__(self, kind: str, step: int, ranks: list[int], delay_s: float = 0.0, attempt: int = 0) -> None:
        if kind not in _ACTIONS:
            raise ValueError(f"unknown fault {kind!r}; use one of {', '.join(_ACTIONS)}")
        self._kind, self._step, self._ranks, self._delay_s = kind, step, ranks, delay_s
        self._rank = Rank.from_environment()
        is_this_attempt = kind == "slow" or self._rank.attempt == attempt
        self._armed = is_this_attempt and (self._rank.rank in ranks or not ranks)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Inject the fault, unless it changes the loss."""
        if not self._armed or trainer.global_step < self._step or self._kind in _OF_LOSS:
            return
        if self._kind == "slow":
            time.sleep(self._delay_s)
            return
        self._armed = False
        if self._kind == "clock":
            _set_clock(self._delay_s)
            return
        if self._kind == "remove_checkpoints":
            shutil.rmtree(run_folder(trainer) / "checkpoints")
            return
        action = _ACTIONS[self._kind]
        if self._delay_s:
            threading.Timer(self._delay_s, action).start()
        else:
            action()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Multiply the loss, and with it every gradient."""
        if self._kind in _OF_LOSS and self._armed and trainer.global_step >= self._step:
            self._armed = False
            factor = _OF_LOSS[self._kind]
            loss.data.mul_(factor)
            loss.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]


def _send(signum: int, pid: Callable[[], int]) -> Callable[[], None]:
    return lambda: os.kill(pid(), signum)


def _node() -> int:
    """Return the process id of the node process, torchrun's parent."""
    node = processes.parent_of(os.getppid())
    assert node is not None, "torchrun has exited"
    return node


def _raise() -> None:
    raise RuntimeError("injected fault")


def _spin() -> None:
    """Hang until a signal arrives; the other threads of the rank continue."""
    while True:
        time.sleep(3600)


def _kill_all() -> None:
    for pid in (_node(), os.getppid(), os.getpid()):
        os.kill(pid, signal.SIGKILL)


def _kill_loader_worker() -> None:
    import multiprocessing

    for child in multiprocessing.active_children():
        os.kill(int(child.pid or 0), signal.SIGKILL)


_OF_LOSS = {"bad_loss": float("nan"), "spike": 1e4}
"""Factor for the loss of one micro-batch."""


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")


def _set_clock(forward_s: float) -> None:
    """Set `time.time` forward; the monotonic clock is not changed."""
    real = time.time
    time.time = lambda: real() + forward_s


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _send(signal.SIGKILL, os.getpid),
    "segfault": _send(signal.SIGSEGV, os.getpid),
    "kill_torchrun": _send(signal.SIGKILL, os.getppid),
    "kill_node": _send(signal.SIGKILL, _node),
    "kill_all": _kill_all,
    "kill_loader_worker": _kill_loader_worker,
    "terminate": _send(signal.SIGTERM, os.getpid),
    "terminate_node": _send(signal.SIGTERM, _node),
    "stop": _send(signal.SIGSTOP, os.getpid),
    "hang": _spin,
    **dict.fromkeys(("bad_loss", "spike", "slow", "clock", "remove_checkpoints"), lambda: None),
    "out_of_memory": _out_of_memory,
    "raise": _raise,
    "exit": lambda: os._exit(0),
}
"""Function that causes each fault."""
