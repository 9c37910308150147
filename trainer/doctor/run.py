"""Run all checks, each in bounded time; one that crashes or hangs is a line of the report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trainer.doctor import gpus, host, network, slurm_view, software, speed, storage
from trainer.doctor.finding import ORDER, Finding, Status
from trainer.doctor.probe import Probe

Check = Callable[[Probe], Iterator[Finding]]
LIMIT_S = 15.0
"""Seconds that a check may take; measurements are made before, with limits of their own."""
CHECKS: dict[str, Check] = {
    "driver": software.driver,
    "torch": software.torch,
    "NCCL": software.nccl,
    "GPU users": gpus.users,
    "GPU memory": gpus.memory_errors,
    "kernel log": gpus.kernel_log,
    "GPU clocks": gpus.clocks,
    "persistence": gpus.persistence,
    "GPU links": gpus.links,
    "precisions": speed.precisions,
    "matrix rate": speed.matrix_rate,
    "all-reduce": speed.all_reduce,
    "storage": storage.speed,
    "renames": storage.renames,
    "locks": storage.locks,
    "disk space": storage.space,
    "temporary": host.temporary,
    "shared memory": host.shared_memory,
    "memory": host.memory,
    "limits": host.limits,
    "CPU binding": host.cpu_binding,
    "NUMA": host.numa,
    "host name": network.hostname,
    "ports": network.ports,
    "InfiniBand": network.fabric,
    "clock": network.clock,
    "W&B": network.weights_and_biases,
    "SLURM": slurm_view.controller,
    "SLURM node": slurm_view.node,
}
"""Name to check, in the order of the report."""


@dataclass(frozen=True)
class _Result:
    findings: list[Finding]


def run_all(probe: Probe, limit_s: float = LIMIT_S, checks: dict[str, Check] | None = None) -> list[Finding]:
    """Return the findings of all checks, in their order."""
    found: list[Finding] = []
    for name, check in (CHECKS if checks is None else checks).items():
        found += [replace(one, check=name) for one in _bounded(check, probe, limit_s)]
    return found


def worst(findings: list[Finding]) -> Status:
    """Return the most severe status of the findings."""
    return max((one.status for one in findings), key=ORDER.index, default="ok")


def _bounded(check: Check, probe: Probe, limit_s: float) -> list[Finding]:
    """Return what a check yields; a thread that waits for a dead file server is left behind."""
    result: list[_Result] = []

    def work() -> None:
        try:
            result.append(_Result(list(check(probe))))
        except Exception as problem:  # a check must not end the report
            text = f"{type(problem).__name__}: {problem}".splitlines()[0]
            fix = "a bug in this check; report it with the output of `trainer env`"
            result.append(_Result([Finding(status="error", text=f"the check failed: {text}", fix=fix)]))

    began = time.monotonic()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    if result:
        return result[0].findings
    text = f"no answer within {time.monotonic() - began:.0f} s"
    return [Finding(status="error", text=text, fix="see `dmesg` and `mount`: a file server or a driver hangs")]
