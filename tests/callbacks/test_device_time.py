"""Times of a batch on a GPU, which is simulated: a queue of work behind a host that runs ahead of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.runtime.test_failure import an_attempt
from trainer.callbacks import device_time
from trainer.callbacks.device_time import EVERY_N_BATCHES, DeviceTime
from trainer.supervise.stragglers import Pace, slowest


class Gpu:
    """Work is queued at once and done in order; `host` and `free` are in seconds."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def work(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        gpu = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = max(gpu.free, gpu.host)

            def query(self) -> bool:
                return gpu.host >= self.at

            def elapsed_time(self, end: Any) -> float:
                assert end.query(), "this would raise: the event has not happened"
                return (end.at - self.at) * 1000

            def synchronize(self) -> None:
                raise AssertionError("a wait for the GPU")

        return Event()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    return made


def train(
    gpu: Gpu, callback: DeviceTime, batches: int, data_s: float = 0.0, forward_s: float = 0.1, peers_s: float = 0.0
) -> None:
    """Batches whose backward pass takes the GPU 0.2 s, and then `peers_s` of waiting; launching takes 1 ms each."""
    none: Any = None
    for _ in range(batches):
        gpu.host += data_s + 0.001
        callback.on_train_batch_start(none, none, none, 0)
        gpu.work(forward_s)
        gpu.host += 0.001
        callback.on_before_backward(none, none, none)
        gpu.work(0.2 + peers_s)
        callback.on_train_batch_end()
        if gpu.free - gpu.host > 1.0:  # the queue is full: a launch waits
            gpu.host = gpu.free - 1.0


def medians(folder: Path, gpu: Gpu, **options: Any) -> dict[str, float]:
    heartbeat = an_attempt(folder).heartbeat
    callback = DeviceTime(heartbeat, options.pop("waits_in_forward", False))
    heartbeat.batches.extend([(0.002, 0.003)] * 64)  # what the clock of the host says: it runs ahead
    train(gpu, callback, 10 * EVERY_N_BATCHES, **options)
    return heartbeat._medians()


def test_times_are_those_of_the_gpu_though_the_host_runs_ahead(tmp_path: Path, gpu: Gpu) -> None:
    found = medians(tmp_path, gpu)
    assert found["own_s"] == pytest.approx(0.1)
    assert found["forward_s"] == pytest.approx(0.1)
    assert found["batch_s"] == pytest.approx(0.3)
    assert "data_s" not in found


def test_waiting_for_data_is_seen_where_the_gpu_waits_too(tmp_path: Path, gpu: Gpu) -> None:
    found = medians(tmp_path, gpu, data_s=0.5, waits_in_forward=True)
    assert found["data_s"] > 0.15  # what is left of it after the rest of the batch before
    assert found["own_s"] == pytest.approx(found["data_s"] + found["forward_s"])


def test_a_slow_gpu_is_the_straggler_whose_host_is_as_fast_as_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    paces = []
    for rank, forward_s in enumerate((0.1, 0.25, 0.1)):
        gpu = Gpu()
        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        found = medians(tmp_path / str(rank), gpu, forward_s=forward_s, peers_s=0.25 - forward_s)
        measures = {name: found[name] for name in ("own_s", "forward_s")}
        paces.append(Pace(rank, "host", "cuda", found["batch_s"], measures))
    straggler = slowest(paces, factor=1.5)
    assert straggler is not None
    assert (straggler.pace.rank, round(straggler.factor, 6)) == (1, 2.5)


def test_a_batch_around_a_save_or_a_validation_is_not_measured(tmp_path: Path, gpu: Gpu) -> None:
    heartbeat = an_attempt(tmp_path).heartbeat
    callback = DeviceTime(heartbeat)
    for discard in (callback.on_save_checkpoint, callback.on_validation_start, callback.on_train_epoch_start):
        train(gpu, callback, EVERY_N_BATCHES)
        gpu.host += 100
        discard()
    assert not heartbeat.device_batches
    train(gpu, callback, 3 * EVERY_N_BATCHES)
    assert all(batch.batch_s < 1 for batch in heartbeat.device_batches)


def test_a_block_is_timed_where_the_whole_forward_pass_waits_for_others(
    tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Block(nn.Linear):
        """Gathers its parameters, which takes as long as the slowest rank needs, and computes."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            gpu.work(0.01)
            return super().forward(inputs)

    class Model(nn.Sequential):
        options = None

    monkeypatch.setattr(device_time, "FSDPModule", Block)
    model: Any = Model(*(Block(2, 2) for _ in range(3)))
    for block in model:
        block.register_forward_pre_hook(lambda *_: gpu.work(0.3), prepend=True)  # as FSDP's own
    heartbeat, none = an_attempt(tmp_path).heartbeat, Any
    callback = DeviceTime(heartbeat, waits_in_forward=True)
    trainer: Any = type("Trainer", (), {"strategy": model})()
    callback.on_train_start(trainer, model)
    for _ in range(3 * EVERY_N_BATCHES):
        callback.on_train_batch_start(none, none, none, 0)
        model(torch.ones(1, 2))
        callback.on_before_backward(none, none, none)
        callback.on_train_batch_end()
        gpu.host = gpu.free
    assert heartbeat._medians()["forward_s"] == pytest.approx(3 * 0.01)
    callback.on_train_end(trainer, model)
    assert not any(block._forward_hooks for block in model)
