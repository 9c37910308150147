"""Faults of the software and of the GPUs, by check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.doctor.faults import Fault, fault, nvml, used, with_variables
from tests.doctor.machine import GPU_IS_LOST, Nvml, commands, facts, gpu_facts, healthy
from trainer.core.gpus import TorchBuild
from trainer.doctor.probe import Ran

BUSY_CPU = facts(gpu_facts(0), gpu_facts(1, matrix_flops={"bf16": 300e12}))
FP8_BROKEN = {**gpu_facts(0).works, "fp8": "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"}
XID = "[12.3] NVRM: Xid (PCI:0000:17:00): {}, pid=77, name=python\n"


def _touched(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


FAULTS = [
    fault(
        "driver", "torch for the CPU", "error", "torch is built for CPUs only", "pytorch.org", build=TorchBuild("cpu")
    ),
    fault("driver", "old driver", "error", "CUDA 13.0 at most", "update the driver", build=TorchBuild("cuda", "14.0")),
    fault("driver", "lost GPU", "warning", "GPU 1", "sudo dmesg", **nvml(code=GPU_IS_LOST)),
    with_variables("driver", "no such GPU", "error", "names no GPU", "it has 0", CUDA_VISIBLE_DEVICES="7"),
    fault("torch", "not installed", "error", "not installed", "pip install torch", build=None),
    fault("torch", "broken", "error", "libcudart", "reinstall", facts=facts(problem="ImportError: libcudart.so.13")),
    fault("torch", "no CUDA", "error", "cannot use the GPUs", "nvidia-uvm", facts=facts(cuda_problem="error 803")),
    fault(
        "torch",
        "no kernels",
        "error",
        "no kernels for NVIDIA H100",
        "pytorch.org",
        facts=facts(architectures=["sm_70", "sm_80"]),
    ),
    fault(
        "torch", "fewer GPUs", "warning", "torch sees 1 GPUs, the driver 2", "nvidia-smi -L", facts=facts(gpu_facts(0))
    ),
    fault("torch", "newer CUDA", "warning", "built for CUDA 13.2", "update the driver", facts=facts(cuda="13.2")),
    fault("NCCL", "none", "error", "has no NCCL", "install torch", facts=facts(nccl="")),
    with_variables("NCCL", "P2P off", "warning", "NCCL_P2P_DISABLE", "unset NCCL_P2P_DISABLE", NCCL_P2P_DISABLE="1"),
    with_variables("NCCL", "interface", "error", "there is no such interface", "eth0", NCCL_SOCKET_IFNAME="ib7"),
    with_variables(
        "NCCL", "preload", "warning", "before torch's own", "unset LD_PRELOAD", LD_PRELOAD="/opt/nccl/libnccl.so.2"
    ),
    Fault(
        "NCCL",
        "library path",
        lambda root: replace(
            with_variables("", "", "ok", "", "", LD_LIBRARY_PATH=str(root / "opt")).machine(root),
            root=Path("/"),
            library=healthy(root).library,
            facts=facts(libraries={"libnccl": str(_touched(root / "opt/libnccl.so.2"))}),
        ),
        "warning",
        "libnccl.so.2 before torch's own",
        "unset LD_LIBRARY_PATH",
    ),
    fault("GPU users", "another process", "warning", "GPU 1 is used by", "CUDA_VISIBLE_DEVICES=0", **nvml(compute=[1])),
    fault("GPU memory", "uncorrected", "error", "GPU 1: 3 uncorrected", "--gpu-reset -i 1", **nvml(errors=3)),
    fault("GPU memory", "pending", "error", "waits to be replaced", "--gpu-reset -i 1", **nvml(remapped=(0, 1, 1, 0))),
    fault("GPU memory", "failed", "error", "cannot be replaced", "replaced", **nvml(remapped=(0, 9, 0, 1))),
    fault("GPU memory", "off", "warning", "error correction is off", "--ecc-config=1", **nvml(ecc=0)),
    fault(
        "kernel log", "fallen off", "error", "Xid 79 of 0000:17:00", "reset", run=commands(dmesg=Ran(0, XID.format(79)))
    ),
    fault("kernel log", "a program's", "warning", "Xid 31", "xid-errors", run=commands(dmesg=Ran(0, XID.format(31)))),
    fault("kernel log", "closed", "skipped", "cannot be read", "sudo dmesg", run=commands(dmesg=Ran(1, "", "denied"))),
    fault(
        "GPU clocks",
        "heat",
        "warning",
        "GPU 1 is slowed down by the hardware for its temperature (60",
        "cooling",
        **nvml(throttle=0x40),
    ),
    fault(
        "GPU clocks",
        "heat under load",
        "warning",
        "power supply",
        "power cables",
        facts=facts(gpu_facts(0, throttling=0x80), gpu_facts(1)),
    ),
    fault("GPU clocks", "power limit", "warning", "limited to 400 of 700 W", "-pl 700", **nvml(limit=400_000)),
    fault("GPU clocks", "lanes", "warning", "uses 4 of 16 PCIe lanes", "reseat", **nvml(width=4)),
    fault("persistence", "off", "warning", "off on GPU 1", "nvidia-smi -pm 1", **nvml(persistence=0)),
    fault(
        "GPU links", "NVLink down", "error", "GPU 1: 17 of 18 NVLinks", "fabricmanager", **nvml(links=[1] * 17 + [0])
    ),
    fault(
        "GPU links",
        "no peer",
        "error",
        "no peer-to-peer access between GPUs 0-1",
        "fabricmanager",
        facts=facts(no_peer=[[0, 1]]),
    ),
    fault(
        "GPU links",
        "no peer over PCIe",
        "warning",
        "no peer-to-peer",
        "iommu=pt",
        facts=facts(no_peer=[[0, 1]]),
        library=Nvml([{"links": []}, {"links": []}]),
    ),
    fault(
        "precisions",
        "fp8",
        "error",
        "GPU 0: fp8 does not work",
        "reinstall the driver",
        facts=facts(gpu_facts(0, works=FP8_BROKEN), gpu_facts(1)),
    ),
    fault("matrix rate", "of the peak", "warning", "30% and", "clocks", facts=BUSY_CPU),
    fault(
        "matrix rate",
        "slower than usual",
        "warning",
        "matrix bf16 GPU 1 has 80%",
        "--new-baseline",
        baseline=used("2 x H100", matrix__bf16__GPU__1=875e12),
    ),
    fault(
        "matrix rate",
        "nothing works",
        "error",
        "GPU 1 computes nothing",
        "precisions",
        facts=facts(gpu_facts(0), gpu_facts(1, matrix_flops={})),
    ),
    fault(
        "all-reduce",
        "failed",
        "error",
        "cannot all-reduce: NCCL error",
        "NCCL_DEBUG",
        facts=facts(reduce_problem="NCCL error"),
    ),
    fault("all-reduce", "slow link", "warning", "11% of NVLink", "NCCL_DEBUG", facts=facts(reduce_bytes_s=50e9)),
    fault(
        "all-reduce",
        "slower than usual",
        "warning",
        "all-reduce of 2 has 60%",
        "--new-baseline",
        facts=facts(reduce_bytes_s=240e9),
        baseline=used("2 x H100", **{"all-reduce__of__2": 400e9}),
    ),
]
