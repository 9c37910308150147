"""Start the processes that measure: torch on the devices, the use of a file system, the ranks of an all-reduce."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from trainer.core import network, processes, records
from trainer.core.gpus import Inventory
from trainer.core.hardware import usable_cores
from trainer.core.records import BadRecord
from trainer.doctor.facts import Facts, StorageFacts
from trainer.doctor.probe import Probe, give_up
from trainer.doctor.storage import existing
from trainer.hardware import baseline
from trainer.runtime.reduce_answer import ReduceSpeed, told

_TORCH_S, _GPU_S, _STORAGE_S, _REDUCE_S = 60.0, 30.0, 60.0, 90.0
"""Seconds until a process is given up; for torch and per GPU. Most of it is for a first import from a slow disk."""
_MEGABYTES = 128
_MOST_CPU_RANKS = 2
_JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


def measured(probe: Probe) -> Probe:
    """Return the probe with what was measured, and with the baseline of this machine; takes up to some minutes."""
    facts = with_all_reduce(torch_facts(probe.gpus), probe.gpus)
    storage = storage_facts(probe.folder)
    kept = baseline.read(probe.hostname(), baseline.hardware_of([one.name for one in facts.devices]))
    return replace(probe, facts=facts, storage=storage, baseline=kept)


def torch_facts(gpus: Inventory) -> Facts:
    """Return what torch finds and reaches here."""
    busy = ",".join(gpu.uuid for gpu in gpus.gpus if gpu.holder and gpu.uuid)
    answer = _ask(Facts, "trainer.doctor.measure", [busy], _TORCH_S + _GPU_S * len(gpus.gpus))
    return answer if isinstance(answer, Facts) else Facts(problem=answer)


def storage_facts(folder: Path, megabytes: int = _MEGABYTES) -> StorageFacts:
    """Return how the file system of a folder, which need not exist yet, behaves."""
    answer = _ask(StorageFacts, "trainer.doctor.storage_use", [str(existing(folder)), str(megabytes)], _STORAGE_S)
    return answer if isinstance(answer, StorageFacts) else StorageFacts(problem=answer)


def with_all_reduce(facts: Facts, gpus: Inventory) -> Facts:
    """Return the facts with the speed of an all-reduce among the free GPUs, or among two processes on the CPU."""
    if facts.problem:
        return facts
    if facts.devices:
        free = [gpu.entry for gpu in gpus.gpus if not gpu.holder]
        ranks, device = len(free), "cuda"
    else:
        free, device = [], "cpu"
        ranks = min(_MOST_CPU_RANKS, usable_cores())
    if ranks < 2:
        return facts
    answers = _reduce(device, ranks, {"CUDA_VISIBLE_DEVICES": ",".join(free)} if free else {})
    speeds = [one.bytes_per_s for one in answers if isinstance(one, ReduceSpeed) and one.bytes_per_s is not None]
    if len(speeds) < ranks:
        failed = next((one for one in answers if isinstance(one, str)), "a rank ended early")
        return replace(facts, ranks=ranks, reduce_problem=failed)
    return replace(facts, ranks=ranks, reduce_bytes_s=min(speeds))


def _reduce(device: str, ranks: int, variables: dict[str, str]) -> list[ReduceSpeed | str]:
    """Return what each rank measured, or the last line of its error."""
    token = secrets.token_hex(8)
    with network.listen("127.0.0.1") as listener:
        loopback = network.loopback_interface()
        common = {
            **_environment(),
            **variables,
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "OMP_NUM_THREADS": "1"},
            **{"WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback},
        }
        started = []
        for rank in range(ranks):
            command = processes.python_module("trainer.runtime.all_reduce_speed", device, str(_REDUCE_S), token)
            given = [listener.fileno()] if rank == 0 else []
            command += map(str, given)
            process = subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=given,
            )
            started.append(process)
        try:
            return [_answer_of(process) for process in started]
        except BaseException:
            for process in started:
                give_up(process)
            raise


def _answer_of(process: subprocess.Popen[str]) -> ReduceSpeed | str:
    try:
        out, errors = process.communicate(timeout=_REDUCE_S)
    except subprocess.TimeoutExpired:
        give_up(process)
        return f"no answer within {_REDUCE_S:.0f} s"
    if process.returncode == 0:
        return told(out) or "a rank printed no speed"
    return (errors.strip().splitlines() or [f"a rank ended with exit code {process.returncode}"])[-1]


def _ask(cls: type[T], module: str, arguments: Sequence[str], timeout_s: float) -> T | str:
    """Start a process and return the record that it prints as its last line, or why there is none."""
    # A file, because a process that is left behind must not be able to fill a pipe that nobody reads.
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            processes.python_module(module, *arguments),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        )
        try:
            out, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            give_up(process)
            return f"no answer within {timeout_s:.0f} s"
        except BaseException:
            give_up(process)
            raise
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode != 0:
        return lines[-1] if lines else f"the process ended with exit code {process.returncode}"
    try:
        return records.loads(cls, next(reversed(out.strip().splitlines()), ""), f"the answer of {module}")
    except BadRecord as error:
        return error.message


def _environment() -> dict[str, str]:
    """Return this environment without a job's variables, and without relative paths for modules."""
    kept = {name: value for name, value in os.environ.items() if name not in _JOB_VARIABLES}
    if "PYTHONPATH" in kept:
        kept["PYTHONPATH"] = processes.absolute_path_list(kept["PYTHONPATH"])
    return kept
