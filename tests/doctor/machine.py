"""A healthy machine with two H100, which the tests break: files, a stand-in for NVML, measurements, commands."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainer.core.gpus import TorchBuild
from trainer.core.network import LocalAddress
from trainer.doctor.facts import DeviceFacts, Facts, StorageFacts
from trainer.doctor.probe import Probe, Ran
from trainer.hardware.baseline import Baseline

GPU_IS_LOST = 15
H100 = "NVIDIA H100 80GB HBM3"
NOT_SUPPORTED = 3
PING = "Slurmctld(primary) at head is UP\n"
SHOW_NODE = "NodeName=node1 CPUTot=16 RealMemory=60000 Gres=gpu:h100:2(S:0) State=MIXED Reason=none\n"
_KINDS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8")


class Nvml:
    """The functions that the checks call. `gpus` are dicts of what a GPU reports; a missing key is not supported."""

    def __init__(self, gpus: Sequence[Mapping[str, Any]]) -> None:
        self.gpus = [
            {
                **{"name": H100, "uuid": f"GPU-{index}", "ecc": 1, "errors": 0, "remapped": (0, 0, 0, 0)},
                **{"persistence": 1, "throttle": 0, "limit": 700_000, "width": 16, "most": 16, "links": [1] * 18},
                **{"compute": [], "used": 0, "code": 0},
                **one,
            }
            for index, one in enumerate(gpus)
        ]

    def _put(self, key: str, handle: Any, *targets: Any) -> int:
        value = self.gpus[handle.value - 1].get(key)
        if value is None:
            return NOT_SUPPORTED
        values = value if isinstance(value, (tuple, list)) else [value] * len(targets)
        for target, one in zip(targets, values, strict=True):
            target._obj.value = one
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, length: Any) -> int:
        buffer.value = b"580.95.05"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> int:
        version._obj.value = 13000
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return int(self.gpus[index.value]["code"])

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, length: Any) -> int:
        buffer.value = str(self.gpus[handle.value - 1]["uuid"]).encode()
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, length: Any) -> int:
        buffer.value = str(self.gpus[handle.value - 1]["name"]).encode()
        return 0

    def nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        return NOT_SUPPORTED

    def nvmlDeviceGetMemoryInfo_v2(self, handle: Any, memory: Any) -> int:
        memory._obj.used, memory._obj.total = self.gpus[handle.value - 1]["used"], 80 * 10**9
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, processes: Any) -> int:
        pids = self.gpus[handle.value - 1]["compute"]
        count._obj.value = len(pids)
        for number, pid in enumerate(pids):
            processes[number].pid = pid
        return 0

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, handle: Any, count: Any, processes: Any) -> int:
        count._obj.value = 0
        return 0

    def nvmlDeviceGetEccMode(self, handle: Any, current: Any, pending: Any) -> int:
        return self._put("ecc", handle, current, pending)

    def nvmlDeviceGetTotalEccErrors(self, handle: Any, kind: Any, counter: Any, errors: Any) -> int:
        assert (kind.value, counter.value) == (1, 0)
        return self._put("errors", handle, errors)

    def nvmlDeviceGetRemappedRows(self, handle: Any, *rows: Any) -> int:
        return self._put("remapped", handle, *rows)

    def nvmlDeviceGetPersistenceMode(self, handle: Any, mode: Any) -> int:
        return self._put("persistence", handle, mode)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, reasons: Any) -> int:
        return self._put("throttle", handle, reasons)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, degrees: Any) -> int:
        degrees._obj.value = 60
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, milliwatts: Any) -> int:
        return self._put("limit", handle, milliwatts)

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: Any, width: Any) -> int:
        return self._put("width", handle, width)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: Any, width: Any) -> int:
        return self._put("most", handle, width)

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: Any, state: Any) -> int:
        links = self.gpus[handle.value - 1]["links"]
        if link.value >= len(links):
            return NOT_SUPPORTED
        state._obj.value = links[link.value]
        return 0


def gpu_facts(index: int, **changes: Any) -> DeviceFacts:
    """What torch reaches on an H100 in order."""
    rates = {"fp64": 45e12, "fp32": 50e12, "tf32": 350e12, "bf16": 700e12, "fp16": 700e12, "fp8": 1300e12}
    good = DeviceFacts(
        name=H100,
        index=index,
        memory_bytes=85 * 10**9,
        capability="9.0",
        multiprocessors=132,
        works=dict.fromkeys(_KINDS, ""),
        matrix_flops=rates,
        memory_bytes_s=2.8e12,
        host_bytes_s=5e10,
    )
    return replace(good, **changes)


def facts(*devices: DeviceFacts, **changes: Any) -> Facts:
    """What torch finds on a machine in order."""
    cpu = DeviceFacts(
        name="CPU", index=-1, works={"fp32": "", "bf16": ""}, matrix_flops={"fp32": 1e12}, memory_bytes_s=5e10
    )
    good = Facts(
        torch="2.13.0+cu130",
        cuda="13.0",
        nccl="2.28.3",
        libraries={"libnccl": "/venv/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2"},
        architectures=["sm_80", "sm_90", "sm_100"],
        threads=16,
        cpu=cpu,
        devices=list(devices or (gpu_facts(0), gpu_facts(1))),
        ranks=2,
        reduce_bytes_s=380e9,
    )
    return replace(good, **changes)


STORAGE = StorageFacts(write_bytes_s=1e9, read_bytes_s=2e9, renames_s=2000)


def commands(**answers: Ran) -> Any:
    """A stand-in for `run`: the answer by the program, or by program_argument."""
    known = {
        "dmesg": Ran(0, "[ 0.0] Linux version 6.1\n"),
        "scontrol_ping": Ran(0, PING),
        "sinfo": Ran(0, ""),
        "scontrol_--oneliner": Ran(0, SHOW_NODE),
        **answers,
    }

    def run(command: Sequence[str], timeout_s: float = 10.0) -> Ran:
        key = f"{command[0]}_{command[1]}" if len(command) > 1 else command[0]
        return known.get(key) or known.get(command[0]) or Ran(127, "", "not installed")

    return run


def disk(total: int, free: int, inodes: int = 10**6) -> Any:
    """A stand-in for `statvfs`."""
    return SimpleNamespace(f_frsize=1, f_blocks=total, f_bavail=free, f_files=2 * inodes, f_favail=inodes)


def healthy(root: Path, **changes: Any) -> Probe:
    """The probe of a machine in order, which is inside of a job of SLURM."""
    files = {
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        "proc/self/mountinfo": f"36 35 98:0 / {root} rw - ext4 /dev/root rw\n",
        "proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
        "proc/sys/vm/zone_reclaim_mode": "0\n",
        "sys/devices/system/cpu/online": "0-15\n",
        "sys/devices/system/node/node0/cpulist": "0-7\n",
        "sys/devices/system/node/node1/cpulist": "8-15\n",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    }
    for number in range(2):
        place = f"sys/bus/pci/devices/0000:{number}7:00.0"
        files |= {f"{place}/vendor": "0x10de\n", f"{place}/class": "0x030200\n", f"{place}/numa_node": f"{number}\n"}
    for name, text in files.items():
        write(root, name, text)
    (root / "dev/shm").mkdir(parents=True, exist_ok=True)
    (root / "tmp").mkdir(exist_ok=True)
    good = Probe(
        root=root,
        environment={
            "SLURMD_NODENAME": "node1",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_GPUS_ON_NODE": "2",
            "WANDB_API_KEY": "0" * 40,
        },
        folder=root / "runs",
        library=Nvml([{}, {}]),
        build=TorchBuild("cuda", "13.0"),
        facts=facts(),
        storage=STORAGE,
        baseline=Baseline(host="node1", hardware="2 x H100"),
        run=commands(),
        hostname=lambda: "node1",
        resolve=lambda name: ["10.0.0.1"],
        addresses=lambda: [LocalAddress("127.0.0.1", "lo"), LocalAddress("10.0.0.1", "eth0")],
        affinity=lambda: set(range(16)),
        limit=lambda which: (
            (resource.RLIM_INFINITY, resource.RLIM_INFINITY) if which != resource.RLIMIT_NOFILE else (65536, 1 << 20)
        ),
        space=lambda path: disk(64 * 10**9, 32 * 10**9),
        is_clock_synchronized=lambda: True,
        fetch=lambda url, timeout_s: "",
        can_listen=lambda address: "",
    )
    return replace(good, **changes)


def write(root: Path, name: str, text: str) -> None:
    """Write a file below the root."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
