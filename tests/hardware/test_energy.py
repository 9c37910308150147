"""Energy counters: RAPL from a tree of files, NVML from a stand-in for its library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.core.test_gpus import Nvml, mig
from tests.hardware.powercap import RANGE_UJ, Powercap
from trainer.core import gpus
from trainer.core.gpus import TorchBuild
from trainer.hardware.energy import SYSFS_VARIABLE, Counters, counters_of


def on_cpu(sysfs: Powercap, cores: int, **options: Any) -> Counters:
    return counters_of(0, {}, sysfs=sysfs.root, cores=range(cores), **options)


def test_a_job_gets_its_share_of_the_packages_that_it_has_cores_of(tmp_path: Path) -> None:
    sysfs = Powercap(tmp_path, {0: 4, 1: 4})
    counters = on_cpu(sysfs, 2)
    sysfs.set(100, 0, memory_joules=10)
    sysfs.set(7000, 1, memory_joules=700)
    assert counters.used() == {"cpu": 50.0, "memory": 5.0}  # nothing of package 1
    assert counters.used() == {"cpu": 0.0, "memory": 0.0}
    assert counters.missing == {}


def test_a_counter_that_starts_again_is_followed(tmp_path: Path) -> None:
    sysfs = Powercap(tmp_path)
    sysfs.set(RANGE_UJ / 1e6 - 30)
    counters = on_cpu(sysfs, 4)
    sysfs.set(12)
    assert counters.used()["cpu"] == pytest.approx(42)
    (sysfs.zone(0) / "max_energy_range_uj").unlink()
    unknown = on_cpu(sysfs, 4)
    sysfs.set(1)
    assert unknown.used()["cpu"] == 0.0
    sysfs.set(3)
    assert unknown.used()["cpu"] == pytest.approx(2)


def test_a_counter_that_cannot_be_read_for_a_while_loses_nothing(tmp_path: Path) -> None:
    sysfs = Powercap(tmp_path)
    counters = on_cpu(sysfs, 4)
    path = sysfs.zone(0) / "energy_uj"
    for damage in ("", "many\n"):
        path.write_text(damage)
        assert counters.used()["cpu"] == 0.0
    sysfs.set(20)
    assert counters.used()["cpu"] == pytest.approx(20)


def test_what_counts_the_same_again_is_left_out(tmp_path: Path) -> None:
    sysfs = Powercap(tmp_path)
    for name, content in (("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0")):
        folder = sysfs.root / "class/powercap" / name
        folder.mkdir()
        (folder / "name").write_text(content)
        (folder / "energy_uj").write_text("5")
    assert [counter.name for counter in on_cpu(sysfs, 4).counters] == ["package-0", "dram"]


def test_without_a_counter_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = counters_of(0, {SYSFS_VARIABLE: str(tmp_path / "host")})
    assert none.missing == {"cpu": f"no RAPL counters in {tmp_path}/host/class/powercap"}
    assert none.used() == {}
    sysfs = Powercap(tmp_path)

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "energy_uj":  # root may read everything, so the mode of a file refuses nothing here
            raise PermissionError(13, "Permission denied")
        return path.read_bytes().decode()

    monkeypatch.setattr(Path, "read_text", refuse)
    refused = on_cpu(sysfs, 4)
    assert refused.missing["cpu"] == f"{sysfs.zone(0)}/energy_uj: Permission denied"
    assert refused.measured("cpu") == 0


class Counting(Nvml):
    """NVML whose devices have `joules`, unless they are older than Volta."""

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        found = [device for device in self.devices if device["uuid"] == uuid.decode()]
        return self._handle(found[0], handle) if found else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        device = self.handles[handle.value]
        if "joules" not in device:
            return 3  # NVML_ERROR_NOT_SUPPORTED
        if device["joules"] is None:
            return 15  # NVML_ERROR_GPU_IS_LOST
        energy._obj.value = round(device["joules"] * 1000)
        return 0


@pytest.fixture(autouse=True)
def built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "torch_build", lambda: TorchBuild("cuda", "13.0"))


def on_gpus(library: Nvml, num_gpus: int, tmp_path: Path, visible: str | None = None) -> Counters:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return counters_of(num_gpus, environment, library=library, sysfs=tmp_path)


def test_only_the_gpus_of_the_job_count(tmp_path: Path) -> None:
    library = Counting({"joules": 1000}, {"joules": 2000}, {"joules": 3000}, {"joules": 4000})
    counters = on_gpus(library, 2, tmp_path, "3,1")
    for device, joules in zip(library.devices, (1, 10, 100, 1000), strict=True):
        device["joules"] += joules
    assert counters.used()["gpu"] == pytest.approx(1010)
    assert counters.measured("gpu") == 2
    assert [one.name for one in on_gpus(library, 2, tmp_path).counters] == ["0", "1"]  # one rank on each of the first
    assert list(counters.missing) == ["cpu"]


def test_a_lost_gpu_and_a_driver_that_was_reloaded(tmp_path: Path) -> None:
    library = Counting({"joules": 1000}, {"joules": 1000})
    counters = on_gpus(library, 2, tmp_path)
    library.devices[0]["joules"], library.devices[1]["joules"] = None, 1005
    assert counters.used()["gpu"] == pytest.approx(5)
    library.devices[0]["joules"], library.devices[1]["joules"] = 1020, 3  # back again; its driver was reloaded
    assert counters.used()["gpu"] == pytest.approx(20)
    library.devices[1]["joules"] = 10
    assert counters.used()["gpu"] == pytest.approx(7)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ({"name": "Tesla P100"}, "GPU 0: Tesla P100 has no energy counter"),
        (mig("MIG-a", joules=5), "GPU 0 (MIG-a): a MIG instance has no counter of its own"),
        ({"joules": None}, "GPU 0: nvmlDeviceGetTotalEnergyConsumption: NVML error 15"),
    ],
)
def test_gpus_that_are_not_measured(device: dict[str, Any], reason: str, tmp_path: Path) -> None:
    counters = on_gpus(Counting(device), 1, tmp_path)
    assert counters.missing["gpu"] == reason
    assert counters.measured("gpu") == 0


def test_a_gpu_that_is_not_found(tmp_path: Path) -> None:
    counters = on_gpus(Counting({"joules": 5}), 2, tmp_path)
    assert counters.missing["gpu"] == "1 of 2 GPUs were found"
    assert counters.measured("gpu") == 1
