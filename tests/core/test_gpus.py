"""Which GPUs a job gets, on machines that are imitated: a stand-in for NVML, folders for /dev, /proc and /sys."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from trainer.core import claims
from trainer.core.claims import claim, free_gpus
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.gpus import Inventory, TorchBuild, inventory, torch_build
from trainer.core.nvml import NvmlError, read

CUDA, ROCM, CPU = TorchBuild("cuda", "13.0"), TorchBuild("rocm", "7.0"), TorchBuild("cpu")
GB = 10**9


class Nvml:
    """The functions of libnvidia-ml as ctypes calls them. A device is a dict; `instances` divides it (MIG)."""

    def __init__(self, *devices: dict[str, Any], cuda: int = 13000, init: int = 0) -> None:
        self.devices = [{"uuid": f"GPU-{index:04x}", "name": "NVIDIA H200", **one} for index, one in enumerate(devices)]
        self.cuda, self.init = cuda, init
        self.handles: dict[int, dict[str, Any]] = {}
        self.opened = 0

    def nvmlInit_v2(self) -> int:
        self.opened += self.init == 0
        return self.init

    def nvmlShutdown(self) -> int:
        self.opened -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.devices)
        return 0

    def _handle(self, device: dict[str, Any], handle: Any) -> int:
        self.handles[id(device)] = device
        handle._obj.value = id(device)
        return int(device.get("error", 0))

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        return self._handle(self.devices[index.value], handle)

    def nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        device = self.handles[handle.value]
        if "instances" not in device:
            return 3  # NVML_ERROR_NOT_SUPPORTED
        current._obj.value = pending._obj.value = 1
        return 0

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, count: Any) -> int:
        count._obj.value = 7
        return 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: Any, found: Any) -> int:
        instances = self.handles[handle.value]["instances"]
        return self._handle(instances[index.value], found) if index.value < len(instances) else 6

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, length: Any) -> int:
        buffer.value = self.handles[handle.value]["uuid"].encode()
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, length: Any) -> int:
        buffer.value = self.handles[handle.value]["name"].encode()
        return 0

    def nvmlDeviceGetMemoryInfo_v2(self, handle: Any, memory: Any) -> int:
        device = self.handles[handle.value]
        if "used" not in device:
            return 3
        assert memory._obj.version == 0x02000028
        memory._obj.used, memory._obj.total = device["used"], device.get("total", 141 * GB)
        return 0

    def _processes(self, which: str, handle: Any, count: Any, processes: Any) -> int:
        pids = self.handles[handle.value].get(which, [])
        count._obj.value = len(pids)
        for number, pid in enumerate(pids):
            processes[number].pid = pid
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, processes: Any) -> int:
        return self._processes("compute", handle, count, processes)

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, handle: Any, count: Any, processes: Any) -> int:
        return self._processes("graphics", handle, count, processes)

    def nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> int:
        version._obj.value = self.cuda
        return 0 if self.cuda else 12


def mig(*uuids: str, **values: Any) -> dict[str, Any]:
    return {"instances": [{"uuid": uuid, "name": "NVIDIA H200 MIG 1g.18gb", **values} for uuid in uuids]}


def look(library: Nvml | None, tmp_path: Path, visible: str | None = None, **options: Any) -> Inventory:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return inventory({**environment, **options.pop("environment", {})}, tmp_path, library, **{"build": CUDA, **options})


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "locks"
    folder.mkdir(mode=0o777)
    monkeypatch.setattr(claims, "_FOLDER", folder)


def test_the_structures_are_those_of_the_header() -> None:
    from trainer.core import nvml

    assert (ctypes.sizeof(nvml._MemoryV2), ctypes.sizeof(nvml._Process), ctypes.sizeof(nvml._Memory)) == (40, 24, 24)


@pytest.mark.parametrize(
    ("visible", "environment", "entries"),
    [
        (None, {}, ["0", "1", "2", "3"]),
        ("2,0", {}, ["2", "0"]),
        ("GPU-0003,GPU-0001", {}, ["GPU-0003", "GPU-0001"]),
        ("1,7,2", {}, ["1"]),
        ("", {}, []),
        ("-1", {}, []),
        ("NoDevFiles", {}, []),
    ],
)
def test_nvml_and_cuda_visible_devices(
    visible: str | None, environment: dict[str, str], entries: list[str], tmp_path: Path
) -> None:
    library = Nvml({}, {}, {}, {})
    found = look(library, tmp_path, visible, environment=environment)
    assert [gpu.entry for gpu in found.gpus] == entries
    assert found.most == len(entries)
    assert found.problem is None
    assert library.opened == 0


@pytest.mark.parametrize(
    ("visible", "most", "entries"),
    [
        (None, 1, ["0", "MIG-a1", "MIG-a2"]),
        ("MIG-a2", 1, ["MIG-a2"]),
        ("MIG-a1,MIG-a2", 1, ["MIG-a1"]),
        ("0,MIG-a1", 1, ["MIG-a1"]),
        ("0", 1, ["0"]),
    ],
)
def test_several_mig_instances_count_as_one(visible: str | None, most: int, entries: list[str], tmp_path: Path) -> None:
    found = look(Nvml({}, mig("MIG-a1", "MIG-a2")), tmp_path, visible)
    assert [gpu.entry for gpu in found.gpus] == entries
    assert found.most == most
    only = look(Nvml(mig("MIG-a1", "MIG-a2", "MIG-a3")), tmp_path)
    assert only.most == 1
    assert claim(1, here=only).variables()["CUDA_VISIBLE_DEVICES"] == "MIG-a1"


def driver_files(root: Path, listed: int, numbers: list[int], mode: int = 0o600) -> None:
    for index in range(listed):
        (root / f"proc/driver/nvidia/gpus/0000:{index:02x}:00.0").mkdir(parents=True)
    (root / "dev").mkdir(exist_ok=True)
    for number in numbers:
        (root / f"dev/nvidia{number}").touch(mode)


@pytest.mark.parametrize(
    ("library", "files", "build", "message", "mend"),
    [
        (Nvml(init=18), (1, [0]), CUDA, "have different versions", "reboot"),
        (Nvml(init=9), (1, [0]), CUDA, "their driver is not loaded", "modprobe nvidia"),
        (Nvml(init=4), (2, [0, 1]), CUDA, "2 NVIDIA GPUs, and this process may use none", "--gpus"),
        (Nvml(), (8, []), CUDA, "8 NVIDIA GPUs, and this process may use none", "--gpus all"),
        (Nvml(), (8, [0, 1]), CUDA, "8 NVIDIA GPUs, and this process may use none", "SLURM: --gpus"),
        (None, (8, []), CUDA, "8 NVIDIA GPUs, and this process may use none", "--gpus all"),
        (Nvml({"error": 15}), (1, [0]), CUDA, "GPU 0: nvmlDeviceGetHandleByIndex_v2: NVML error 15", "reboot"),
        (Nvml({}, {}), (2, [0, 1]), CPU, "2 GPUs (NVIDIA H200), but torch is built for CPUs only", "install torch for"),
        (Nvml({}), (1, [0]), ROCM, "torch is built for ROCm only", "install torch for CUDA"),
        (
            Nvml({}, cuda=12040),
            (1, [0]),
            CUDA,
            "supports CUDA 12.4 at most, and torch is built for CUDA 13.0",
            "CUDA 12",
        ),
        (Nvml({}, cuda=0), (1, [0]), CUDA, "not CUDA's library libcuda.so.1", "compute,utility"),
        (Nvml({"instances": []}), (1, [0]), CUDA, "in MIG mode and has no instance", "nvidia-smi mig"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error_with_its_mend(
    library: Nvml | None, files: tuple[int, list[int]], build: TorchBuild, message: str, mend: str, tmp_path: Path
) -> None:
    driver_files(tmp_path, *files)
    found = look(library, tmp_path, build=build)
    assert found.most == 0
    assert found.problem is not None
    assert message in found.problem.message
    assert mend in found.problem.fix
    assert look(library, tmp_path, "", build=build) == Inventory(is_chosen=True), "no GPUs were asked for"


def test_a_device_file_without_permission_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver_files(tmp_path, 1, [0])
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests run as root, to whom everything is permitted
    found = look(Nvml(), tmp_path)
    assert found.problem is not None
    assert found.problem.fix.startswith(
        "permission denied on /dev/nvidia0: ask for access (often a group such as video"
    )


def test_a_machine_with_the_driver_library_and_no_gpu_trains_on_cpu(tmp_path: Path) -> None:
    assert look(Nvml(init=9), tmp_path) == Inventory()
    assert look(None, tmp_path, build=CPU) == Inventory()
    with pytest.raises(NvmlError, match="nvmlInit_v2: NVML error 9"):
        read(Nvml(init=9))


def test_wsl_and_jetson_have_a_gpu_without_device_files_of_the_driver(tmp_path: Path) -> None:
    wsl, jetson = tmp_path / "wsl", tmp_path / "jetson"
    for path in (wsl / "dev/dxg", wsl / "usr/lib/wsl/lib/libcuda.so.1", jetson / "dev/nvhost-gpu"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert look(None, wsl).most == 1
    assert look(Nvml({}), wsl).most == 1
    tree = jetson / "proc/device-tree/compatible"
    tree.parent.mkdir(parents=True)
    tree.write_bytes(b"nvidia,p3737\0nvidia,tegra234\0")
    assert [gpu.name for gpu in look(None, jetson).gpus] == ["NVIDIA Tegra"]
    problem = look(None, jetson, build=CPU).problem
    assert problem is not None
    assert "torch is built for CPUs only" in problem.message


def amd(root: Path, *vram_gb: int, busy: tuple[int, ...] = ()) -> None:
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    (nodes / "0").mkdir(parents=True)
    (nodes / "0/properties").write_text("cpu_cores_count 64\nsimd_count 0\n")
    (root / "dev/dri").mkdir(parents=True)
    (root / "dev/kfd").touch()
    for number, size in enumerate(vram_gb):
        node, render = nodes / str(number + 1), f"renderD{128 + number}"
        device = root / f"sys/class/drm/{render}/device"
        for folder in (node, device):
            folder.mkdir(parents=True)
        (node / "properties").write_text(f"simd_count 304\ndrm_render_minor {128 + number}\nunique_id {number + 16}\n")
        (node / "gpu_id").write_text(f"{1000 + number}\n")
        (node / "name").write_text("mi300x\n")
        (device / "mem_info_vram_total").write_text(f"{size * GB}\n")
        (device / "mem_info_vram_used").write_text(f"{GB // 10}\n")
        (root / "dev/dri" / render).touch()
        if number in busy:
            process = root / f"sys/class/kfd/kfd/proc/{os.getpid()}"
            process.mkdir(parents=True, exist_ok=True)
            (process / f"vram_{1000 + number}").write_text(f"{GB}\n")


def test_amd_gpus_are_counted_by_the_kernels_table(tmp_path: Path) -> None:
    amd(tmp_path, 192, 192, 192, 192, busy=(0,))
    found = look(None, tmp_path, build=ROCM)
    assert found.most == 4
    assert [gpu.holder is not None for gpu in found.gpus] == [True, False, False, False]
    taken = claim(2, here=found)
    assert taken.variables()["HIP_VISIBLE_DEVICES"] == "1,2"
    assert "CUDA_VISIBLE_DEVICES" not in taken.variables()
    taken.release()
    left = look(
        None, tmp_path, build=ROCM, environment={"ROCR_VISIBLE_DEVICES": "3,GPU-11", "HIP_VISIBLE_DEVICES": "1"}
    )
    assert [(gpu.entry, gpu.uuid) for gpu in left.gpus] == [("1", "GPU-11")]
    assert look(None, tmp_path, build=ROCM, environment={"HIP_VISIBLE_DEVICES": "-1"}).most == 0
    problem = look(None, tmp_path, build=CUDA).problem
    assert problem is not None
    assert "4 GPUs (mi300x), but torch is built for CUDA only" in problem.message
    (tmp_path / "dev/kfd").unlink()
    problem = look(None, tmp_path, build=ROCM).problem
    assert problem is not None
    assert "may not open /dev/kfd" in problem.message
    assert "groups render and video" in problem.fix


def test_the_graphics_of_an_amd_processor_is_no_gpu_that_one_trains_on(tmp_path: Path) -> None:
    amd(tmp_path, 1)
    assert look(None, tmp_path, build=CPU) == Inventory()
    assert look(None, tmp_path, build=ROCM).most == 1


def test_free_gpus_are_chosen_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    """Used: by compute processes, or by memory of a process that is not seen. Not used: by a desktop."""
    library = Nvml(
        {"compute": [os.getpid()], "used": 9 * GB},
        {"used": 60 * GB},
        {"graphics": [1, os.getpid()], "compute": [os.getpid()], "used": 20 * GB},
        {"used": GB // 2},
    )
    found = look(library, tmp_path)
    assert free_gpus(found) == 2
    chosen = claim(2, here=found)
    assert chosen.variables()["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert chosen.variables()["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
    assert str(chosen).startswith(f"GPUs 2, 3 (NVIDIA H200); not 0: in use by {name} of ")
    assert str(chosen).endswith("; 1: in use by a process that is not visible here (60.0 GB)")
    assert free_gpus(found) == 0

    with pytest.raises(EnvironmentFault, match="1 GPU requested, and 0 of 4 free") as raised:
        claim(1, here=found, wait_s=0)
    assert "2: taken by another run" in raised.value.fix
    assert "resources.devices=[0]" in raised.value.fix
    beside = claim(1, here=found, is_strict=False, wait_s=0)
    assert beside.variables()["CUDA_VISIBLE_DEVICES"] == "0"
    chosen.release()
    assert free_gpus(found) == 2


def test_a_lock_is_kept_by_the_child_that_inherits_it(tmp_path: Path) -> None:
    """As the node process does after the command that has chosen for it."""
    found = look(Nvml({}, {}), tmp_path)
    chosen = claim(1, here=found)
    (descriptor,) = chosen.locks
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    chosen.release()
    other = claim(1, here=found)
    assert [gpu.index for gpu in other.gpus] == [1]
    os.close(writing)
    os.waitpid(child, 0)
    os.close(reading)
    assert [gpu.index for gpu in claim(1, here=found).gpus] == [0]
    assert descriptor > 2


@pytest.mark.skipif(os.getuid() != 0, reason="becomes other users")
def test_the_lock_of_a_gpu_holds_for_all_users_and_nothing_else_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first user has a umask that lets nobody read; a file is what is locked, or nothing."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        monkeypatch.setattr(claims, "_FOLDER", folder)
        gpus = [claims.Gpu(str(index), index, f"GPU-{index}", "a GPU") for index in range(4)]
        (folder / "trainer-gpu-GPU-2.lock").symlink_to(folder / "elsewhere")
        os.mkfifo(folder / "trainer-gpu-GPU-3.lock")
        umask = os.umask(0o077)
        try:
            os.seteuid(4242)
            first = claims._lock(gpus[0])
            os.seteuid(0)
            os.seteuid(4343)
            assert first is not None
            assert claims._lock(gpus[0]) is None
            os.close(first)
            second = claims._lock(gpus[0])
            assert second is not None
            assert os.fstat(second).st_ino == (folder / "trainer-gpu-GPU-0.lock").stat().st_ino
            os.close(second)
            for gpu in gpus[2:]:  # no lock, and no wait
                descriptor = claims._lock(gpu)
                assert descriptor is not None
                assert os.readlink(f"/proc/self/fd/{descriptor}") == os.devnull
                os.close(descriptor)
        finally:
            os.seteuid(0)
            os.umask(umask)
        assert not (folder / "elsewhere").exists()


def test_named_gpus_are_taken_even_if_they_are_used(tmp_path: Path) -> None:
    library = Nvml(*({"compute": [os.getpid()]} for _ in range(4)))
    found = look(library, tmp_path)
    named = claim(2, ["2", "GPU-0003"], here=found)
    assert named.variables()["CUDA_VISIBLE_DEVICES"] == "2,3"
    again = claim(2, ["2", "3"], here=found)
    assert [gpu.index for gpu in again.gpus] == [2, 3]
    visible = look(library, tmp_path, "3,1")
    taken = claim(2, here=visible)
    assert taken.variables()["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert "CUDA_DEVICE_ORDER" not in taken.variables(), "the user's numbers keep their meaning"
    for devices, why in ((["7"], "7 is not a GPU"), (["1", "GPU-0001"], "is named twice"), (["first"], "first is not")):
        with pytest.raises(UserError, match=why):
            claim(len(devices), devices, here=found)


def test_numbers_of_unlike_gpus_are_not_judged_by_what_nvml_numbers_alike(tmp_path: Path) -> None:
    """CUDA numbers them by speed: its 0 may be NVML's 1."""
    library = Nvml({"name": "NVIDIA T400", "compute": [os.getpid()]}, {"name": "NVIDIA H200"})
    assert look(library, tmp_path, "0").gpus[0].holder is None
    ordered = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert look(library, tmp_path, "0", environment=ordered).gpus[0].holder is not None


def test_the_build_of_torch_is_read_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    here = torch_build()
    assert here is not None
    expected = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    assert here.kind == expected
    package = tmp_path / "torch"
    package.mkdir()
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    for line, build in (
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", TorchBuild("cuda", "13.0")),
        ("cuda = None\nhip = '7.0.51831'", TorchBuild("rocm", "7.0.51831")),
        ("cuda = None\nhip = None", CPU),
    ):
        (package / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
        assert torch_build() == build
