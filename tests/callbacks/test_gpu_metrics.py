"""Metrics of GPUs on logged steps: memory from torch's counters, load from the heartbeat thread, on stand-ins."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.callbacks.test_clock import EVERY, Run
from tests.distributed.ranks import run_ranks
from tests.train.two_loops import Net
from trainer.callbacks.clock import StepClock
from trainer.callbacks.gpu_metrics import GpuMetrics
from trainer.callbacks.metrics import BatchWork, TrainMetrics
from trainer.callbacks.node_metrics import NodeMetrics
from trainer.core import nvml
from trainer.runs.directory import RunDirectory
from trainer.runtime import gpu_load
from trainer.runtime.gpu_load import GpuLoad, Load
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank

DEVICE = torch.device("cuda", 0)


class Allocator:
    """torch's counters, and how often they were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", self._read(70e9))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", self._read(80e9))

    def _read(self, value: float) -> Any:
        def read(device: torch.device) -> float:
            assert device == DEVICE
            self.reads += 1
            return value

        return read


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def test_what_the_driver_does_not_report_is_left_out(allocator: Allocator) -> None:
    metrics = GpuMetrics(DEVICE, None)
    memory = {"gpu/peak_allocated_gb": 70.0, "gpu/peak_reserved_gb": 80.0}
    assert metrics.metrics(metrics.loads(), None) == memory
    load = GpuLoad(lambda: Load(None, 500.0))  # a MIG instance
    load.sample()
    metrics = GpuMetrics(DEVICE, load)
    assert metrics.metrics(metrics.loads(), None) == {**memory, "gpu/power_w": 500.0}


def test_over_ranks_memory_is_the_largest_utilization_the_mean_and_power_the_sum(tmp_path: Path) -> None:
    run_ranks(3, Path(__file__).with_name("gpu_metrics_rank.py"), [str(tmp_path)], tmp_path, 100.0)
    for rank in range(3):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found == pytest.approx(
            {
                "train/loss": 1.0,
                "gpu/peak_allocated_gb": 72.0,
                "gpu/peak_reserved_gb": 90.0,
                "gpu/utilization": 60.0,  # of the two ranks that know it
                "gpu/power_w": 1100.0,
                "system/node-0/gpu_memory_gb": 80.0,
                "system/node-0/gpu_power_w": 600.0,
                "system/node-0/gpu_utilization": 90.0,
                "system/node-1/gpu_memory_gb": 79.0,
                "system/node-1/gpu_power_w": 500.0,
                "system/node-2/gpu_memory_gb": 78.0,
                "system/node-2/gpu_utilization": 30.0,
            }
        )


def host(root: Path, ticks: str, available_kb: int) -> Path:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {ticks}\ncpu0 1 1 1 1\n")
    (root / "proc/meminfo").write_text(f"MemTotal:  2000000 kB\nMemAvailable:  {available_kb} kB\nHugePages_Total: 0\n")
    return root


def test_load_of_two_nodes_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30e9)
    before = "100 0 100 800 0 0 0 0 0 0"
    roots = [host(tmp_path / "busy", before, 500_000), host(tmp_path / "idle", before, 1_500_000)]
    ranks = [NodeMetrics(Rank(rank, rank % 2, 4, 2, 0), DEVICE, roots[rank // 2]) for rank in range(4)]
    host(roots[0], "180 0 100 815 5 0 0 0 0 0", 500_000)  # 80 of 100 ticks in user code
    gpus = [[50.0, 1.0, 300.0, 1.0], [100.0, 1.0, 500.0, 1.0], [20.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    loads = [nodes.loads(gpu) for nodes, gpu in zip(ranks, gpus, strict=True)]
    means = [sum(values) / 4 for values in zip(*loads, strict=True)]
    assert ranks[3].metrics(means) == pytest.approx(
        {
            "system/node-0/cpu_percent": 80.0,
            "system/node-0/memory_gb": 1.536,
            "system/node-0/gpu_utilization": 75.0,
            "system/node-0/gpu_memory_gb": 60.0,
            "system/node-0/gpu_power_w": 800.0,
            "system/node-1/memory_gb": 0.512,
            "system/node-1/gpu_utilization": 20.0,  # of the rank that knows it
            "system/node-1/gpu_memory_gb": 60.0,
        }
    )
    assert set(loads[1]) == {0.0, 1.0, 100.0, 30.0, 500.0}  # the host is that of the first rank of a node


def test_a_load_is_the_mean_since_the_last_one_taken() -> None:
    readings = [Load(50.0, 300.0), Load(100.0, None), Load(80.0, 400.0)]
    load = GpuLoad(lambda: readings.pop(0))
    assert load.take() == Load(None, None)
    load.sample()
    load.sample()
    assert load.take() == Load(75.0, 300.0)
    assert load.take() == Load(75.0, 300.0)  # no reading since
    load.sample()
    assert load.take() == Load(80.0, 400.0)


class Library:
    """Stands in for libnvidia-ml.so.1 with one GPU."""

    def __init__(self, uuid: str, has_utilization: bool = True) -> None:
        self.uuid, self.has_utilization = uuid, has_utilization

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid.decode() == self.uuid else 6

    def nvmlDeviceGetUtilizationRates(self, handle: Any, result: Any) -> int:
        result._obj.gpu = 97
        return 0 if self.has_utilization else 3

    def nvmlDeviceGetPowerUsage(self, handle: Any, result: Any) -> int:
        result._obj.value = 612_500
        return 0


def reader(monkeypatch: pytest.MonkeyPatch, library: Library | None) -> Any:
    monkeypatch.setattr(nvml, "load", lambda: library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a1-b2"))
    return gpu_load.reader_of(DEVICE)


def test_the_driver_is_asked_by_the_uuid_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader(monkeypatch, Library("GPU-a1-b2"))() == Load(97.0, 612.5)
    assert reader(monkeypatch, Library("GPU-a1-b2", has_utilization=False))() == Load(None, 612.5)
    assert reader(monkeypatch, Library("GPU-another")) is None
    assert reader(monkeypatch, None) is None


def test_the_heartbeat_thread_reads_and_drops_a_reader_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heartbeat = Heartbeat(RunDirectory(tmp_path), Rank.from_environment(), every_s=0.01)
    load = GpuLoad(lambda: Load(90.0, 700.0))
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise OSError("gone")

    heartbeat.samplers += [fails, load.sample]
    heartbeat.start()
    deadline = time.monotonic() + 300
    while load.take() == Load(None, None) and time.monotonic() < deadline:
        time.sleep(0.01)
    heartbeat.stop("finish")
    assert load.take() == Load(90.0, 700.0)
    assert len(calls) == 1
    assert "heartbeat sampler removed: OSError: gone" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:The `srun` command")
def test_nothing_is_read_on_steps_that_are_not_logged(tmp_path: Path, allocator: Allocator) -> None:
    load = GpuLoad(lambda: Load(90.0, 700.0))
    load.sample()
    taken: list[int] = []

    run = Run(tmp_path, Net(), max_steps=7)
    clock = next(one for one in run.trainer.callbacks if isinstance(one, StepClock))  # type: ignore[attr-defined]
    metrics = TrainMetrics(EVERY, BatchWork(8, 16), 7, run.heartbeat, None, gpus=GpuMetrics(DEVICE, load))
    metrics.peak_s_per_sample = 1e-6
    clock._metrics = metrics
    take = load.take

    def counted() -> Load:
        taken.append(clock.step)
        return take()

    load.take = counted  # type: ignore[method-assign]
    run.fit()
    assert taken == [3, 6]
    assert allocator.reads == 2 * len(taken)
    line = next(line for step, line in run.lines.lines if "train/mfu" in line)
    assert line["train/mfu"] == pytest.approx(line["train/samples_per_s"] * 1e-6)
    assert line["train/tokens_per_s"] == pytest.approx(16 * line["train/samples_per_s"])
    assert (line["gpu/power_w"], line["gpu/utilization"], line["gpu/peak_allocated_gb"]) == (700.0, 90.0, 70.0)
