"""What the process with torch reports: on an imitated pair of GPUs, and on a real one where there is one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.core.gpus import inventory
from trainer.doctor import measure
from trainer.doctor.measuring import torch_facts
from trainer.hardware.catalogue import known
from trainer.runtime import speed


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 and a GPU that nobody knows, whose speed is made up."""
    names = ["Tesla T4", "NVIDIA Future 1"]
    for name, value in {
        "init": lambda: None,
        "device_count": lambda: 2,
        "get_device_name": lambda index: names[index],
        "get_device_properties": lambda index: SimpleNamespace(
            uuid=f"{index}", total_memory=15 * 10**9, major=7, minor=5, multi_processor_count=40
        ),
        "can_device_access_peer": lambda first, second: False,
        "get_arch_list": lambda: ["sm_75"],
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    rates: dict[str, Any] = {"matrix_flops": lambda device, kind, during=None: 1e12, "works": lambda device, kind: ""}
    rates |= {"memory_bytes_s": lambda device: 3e11, "host_bytes_s": lambda device: 1e10}
    for name, function in rates.items():
        monkeypatch.setattr(speed, name, function)


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_is_measured_in_what_it_has() -> None:
    found = measure.facts(set())
    first, second = found.devices
    assert (first.name, first.capability, first.multiprocessors) == ("Tesla T4", "7.5", 40)
    assert set(first.matrix_flops) == {"fp64", "fp32", "fp16"}, "bf16 is emulated there, and slow"
    assert set(second.matrix_flops) == {"fp64", "fp32", "tf32", "bf16", "fp16", "fp8"}, "unknown: all is measured"
    assert found.no_peer == [[0, 1]]
    assert (found.cuda, found.architectures) == ("13.0", ["sm_75"])


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_in_use_is_not_measured() -> None:
    first, second = measure.facts({"GPU-1"}).devices
    assert first.matrix_flops
    assert (second.is_busy, second.matrix_flops) == (True, {})


@pytest.mark.usefixtures("two_gpus")
def test_a_driver_that_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error 803\nmore")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert measure.facts(set()).cuda_problem == "RuntimeError: CUDA error 803"


def test_arithmetic_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert speed.works(cpu, "fp32") == ""
    monkeypatch.setitem(speed.DTYPES, "bf16", torch.bool)
    assert "Error" in speed.works(cpu, "bf16")
    monkeypatch.setattr(torch, "ones", lambda *sizes, **options: torch.zeros(*sizes))
    assert speed.works(cpu, "fp32") == "a product of ones is wrong"


@pytest.mark.gpu
def test_a_real_gpu_reaches_what_the_catalogue_says() -> None:
    found = torch_facts(inventory())
    assert (found.problem, found.cuda_problem) == ("", "")
    for one in found.devices:
        device = known(one.name)
        if device is None or one.is_busy:
            continue
        assert device.multiprocessors in (None, one.multiprocessors)
        assert one.memory_bytes == pytest.approx(device.memory_bytes, rel=0.1)
        for kind, rate in device.peak_tflops.items():
            if kind in one.matrix_flops and kind in ("bf16", "fp16"):
                assert 0.3 < one.matrix_flops[kind] / (rate * 1e12) < 1.1
        assert 0.4 < one.memory_bytes_s / device.bandwidth_bytes_s < 1.1
