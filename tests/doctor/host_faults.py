"""Faults of file systems, host, network and SLURM, by check."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.doctor.faults import Fault, fault, limits, used, with_file, with_variables
from tests.doctor.machine import STORAGE, commands, disk, healthy, write
from trainer.doctor.probe import Probe, Ran


def _missing(path: Path) -> Any:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _with_files_left(root: Path) -> Probe:
    write(root, "dev/shm/torch_77_1", "")
    return healthy(root, space=lambda path: disk(10**10, 10**7))


FAULTS = [
    fault(
        "storage",
        "not writable",
        "error",
        "Permission denied",
        "runs_dir",
        storage=replace(STORAGE, problem="/runs: Permission denied"),
    ),
    fault(
        "storage",
        "slow",
        "warning",
        "10 MB/s written",
        "faster file system",
        storage=replace(STORAGE, write_bytes_s=1e7),
    ),
    Fault(
        "storage",
        "slower than usual",
        lambda root: healthy(root, baseline=used("", **{f"storage__write__{root / 'runs'}": 1e11})),
        "warning",
        "has 1% of what it usually",
        "--new-baseline",
    ),
    fault(
        "renames",
        "torn",
        "error",
        "a file was missing",
        "another file system",
        storage=replace(STORAGE, torn="a file was missing"),
    ),
    fault(
        "renames", "slow", "warning", "only 5 files per second", "small files", storage=replace(STORAGE, renames_s=5)
    ),
    fault(
        "locks",
        "none",
        "error",
        "flock locks do not keep a second process out (ext4)",
        "mount it with locks",
        storage=replace(STORAGE, unlocked=["flock"]),
    ),
    fault("disk space", "full", "error", "0.5 GB free", "trainer rm", space=lambda path: disk(10**12, 5 * 10**8)),
    fault(
        "disk space",
        "no inodes",
        "error",
        "100 files can be made",
        "trainer rm",
        space=lambda path: disk(10**12, 10**12, 100),
    ),
    fault("disk space", "little", "warning", "10.0 GB free", "trainer rm", space=lambda path: disk(10**12, 10**10)),
    Fault(
        "disk space",
        "volatile",
        lambda root: with_file(
            "", "", "ok", "", "", proc__self__mountinfo=f"36 35 98:0 / {root} rw - tmpfs tmpfs rw\n"
        ).machine(root),
        "warning",
        "gone after a restart",
        "runs_dir",
    ),
    fault("disk space", "no answer", "error", "No such file or directory", "runs_dir=FOLDER", space=_missing),
    fault("temporary", "missing", "error", "No such file", "unset TMPDIR", space=_missing),
    fault("temporary", "full", "warning", "5 MB free in /tmp", "TMPDIR", space=lambda path: disk(10**12, 5 * 10**6)),
    fault("shared memory", "not mounted", "error", "/dev/shm: No such file", "sudo mount -t tmpfs", space=_missing),
    fault(
        "shared memory",
        "docker's",
        "error",
        "67 MB of 67 MB free",
        "--shm-size",
        space=lambda path: disk(67 * 10**6, 67 * 10**6),
    ),
    fault(
        "shared memory",
        "little",
        "warning",
        "500 MB of 500 MB",
        "--shm-size",
        space=lambda path: disk(5 * 10**8, 5 * 10**8),
    ),
    Fault("shared memory", "left behind", _with_files_left, "warning", "10 MB of 10.0 GB free", "1 left by ended"),
    with_file("memory", "little", "warning", "1.0 GB of memory", "ps aux", proc__meminfo="MemAvailable: 1000000 kB\n"),
    fault("limits", "open files", "error", "256 files may be open", "ulimit -n 65536", limit=limits(NOFILE=256)),
    fault("limits", "few files", "warning", "2048 files may be open", "ulimit -n 65536", limit=limits(NOFILE=2048)),
    fault("limits", "processes", "warning", "512 processes", "ulimit -u", limit=limits(NPROC=512)),
    fault(
        "limits", "locked memory", "error", "InfiniBand needs it unlimited", "ulimit -l", limit=limits(MEMLOCK=65536)
    ),
    with_file(
        "CPU binding",
        "quota of a container",
        "warning",
        "1 of 16 cores",
        "raise --cpus",
        **{"sys__fs__cgroup__cpu.max": "50000 100000"},
    ),
    fault("CPU binding", "one core", "warning", "1 of 16 cores", "taskset", affinity=lambda: {3}),
    with_variables(
        "CPU binding", "threads", "warning", "OMP_NUM_THREADS=64", "unset OMP_NUM_THREADS", OMP_NUM_THREADS="64"
    ),
    with_file(
        "CPU binding",
        "powersave",
        "warning",
        "lowest clock",
        "cpupower",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="powersave",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_driver="acpi-cpufreq",
    ),
    fault(
        "NUMA", "far GPU", "warning", "0000:17:00.0 is on NUMA node 1", "numa_binding", affinity=lambda: set(range(8))
    ),
    with_file("NUMA", "reclaim", "warning", "zone_reclaim_mode", "sysctl", proc__sys__vm__zone_reclaim_mode="1"),
    Fault(
        "NUMA",
        "unknown node",
        lambda root: (healthy(root), write(root, "sys/bus/pci/devices/0000:07:00.0/numa_node", "-1"))[0],
        "warning",
        "GPU 0000:07:00.0 is not known",
        "BIOS",
    ),
    fault(
        "host name",
        "loopback",
        "warning",
        "resolves to 127.0.1.1",
        "write '10.0.0.1 node1' in /etc/hosts",
        resolve=lambda name: ["127.0.1.1"],
    ),
    fault("host name", "unknown", "warning", "does not resolve", "tee -a /etc/hosts", resolve=lambda name: []),
    fault(
        "ports",
        "forbidden",
        "error",
        "no port of 127.0.0.1",
        "sandbox",
        can_listen=lambda address: "Operation not permitted" if address == "127.0.0.1" else "",
    ),
    with_file(
        "ports",
        "few",
        "warning",
        "only ports 60000 to 60100",
        "sysctl",
        proc__sys__net__ipv4__ip_local_port_range="60000\t60100\n",
    ),
    with_variables("ports", "left behind", "warning", "MASTER_ADDR is set", "unset MASTER_ADDR", MASTER_ADDR="node0"),
    with_file(
        "InfiniBand",
        "down",
        "error",
        "mlx5_0/1 down",
        "ibstat",
        sys__class__infiniband__mlx5_0__ports__1__state="1: DOWN",
    ),
    with_file(
        "InfiniBand",
        "one down",
        "warning",
        "1 up; down: mlx5_1/1",
        "NCCL_IB_HCA",
        sys__class__infiniband__mlx5_1__ports__1__state="1: DOWN",
    ),
    fault("clock", "wrong", "error", "differs by 60.0 s", "chrony", storage=replace(STORAGE, skew_s=-60.0)),
    fault("clock", "off", "warning", "differs by 1.0 s", "chrony", storage=replace(STORAGE, skew_s=1.0)),
    fault("clock", "free", "warning", "not synchronized", "chrony", is_clock_synchronized=lambda: False),
    fault(
        "W&B",
        "no route",
        "warning",
        "cannot be reached: no route",
        "tracking.mode=offline",
        fetch=lambda url, timeout_s: "no route",
    ),
    Fault(
        "W&B",
        "no key",
        lambda root: healthy(root, environment={}, tracking_mode="online"),
        "warning",
        "there is no API key",
        "wandb login",
    ),
    with_variables("W&B", "mode", "error", "unknown W&B mode", "use one of", WANDB_MODE="sometimes"),
    fault(
        "SLURM",
        "no answer to a job for it",
        "error",
        "does not answer",
        "slurmctld",
        run=commands(scontrol_ping=Ran(1, "Slurmctld(primary) at head is DOWN\n")),
        environment={},
        is_on_slurm=True,
    ),
    fault(
        "SLURM",
        "no answer",
        "error",
        "does not answer",
        "slurmctld",
        run=commands(scontrol_ping=Ran(1, "Slurmctld(primary) at head is DOWN\n")),
    ),
    fault(
        "SLURM",
        "drained",
        "warning",
        "node7 drained: bad disk",
        "state=resume",
        run=commands(sinfo=Ran(0, "node7|drained|bad disk\n")),
    ),
    fault(
        "SLURM node",
        "cores",
        "error",
        "SLURM gives this node 64 cores, it has 16",
        "slurmd -C",
        run=commands(**{"scontrol_--oneliner": Ran(0, "NodeName=node1 CPUTot=64 RealMemory=60000 State=IDLE")}),
    ),
    fault(
        "SLURM node",
        "memory",
        "error",
        "it has 62500 MB: jobs are killed",
        "slurmd -C",
        run=commands(**{"scontrol_--oneliner": Ran(0, "NodeName=node1 CPUTot=16 RealMemory=99000 State=IDLE")}),
    ),
    fault(
        "SLURM node",
        "drained",
        "warning",
        "node1 is IDLE+DRAIN",
        "state=resume",
        run=commands(**{"scontrol_--oneliner": Ran(0, "NodeName=node1 CPUTot=16 RealMemory=60000 State=IDLE+DRAIN")}),
    ),
    fault(
        "SLURM node",
        "little memory",
        "warning",
        "SLURM knows of 2000 of 62500 MB",
        "slurmd -C",
        run=commands(**{"scontrol_--oneliner": Ran(0, "NodeName=node1 CPUTot=16 RealMemory=2000 State=IDLE")}),
    ),
    fault(
        "SLURM node",
        "GPUs of others",
        "warning",
        "this job requested no GPU, and 2 can be used",
        "ConstrainDevices=yes",
        environment={"SLURMD_NODENAME": "node1", "SLURM_JOB_ID": "7"},
    ),
    with_variables(
        "SLURM node",
        "GPUs",
        "error",
        "allocated 4 GPUs of this node, 2 can be used",
        "gres.conf",
        SLURM_GPUS_ON_NODE="4",
    ),
    fault(
        "SLURM node",
        "binding",
        "warning",
        "allocated 16 cores, this process is bound to 4",
        "--cpus-per-task",
        affinity=lambda: set(range(4)),
    ),
    with_variables(
        "SLURM node",
        "no cgroups",
        "warning",
        "allocated 4 cores, this process may use 16",
        "ConstrainCores",
        SLURM_CPUS_ON_NODE="4",
    ),
]
