"""The slots of a local sweep: each is a process that trains one trial after the other, on devices of its own.

A slot becomes the node process of its trial by exec(2), and a slot again when the trial ends: its process id is that of
the owner all along. A lock, which the kernel releases, keeps more than `at_once` slots from running.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from trainer.core import processes, records
from trainer.core.hardware import usable_cores
from trainer.core.locks import try_lock
from trainer.sweeps import decide
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import TrialView
from trainer.sweeps.records import ADAPTIVE, Spec

MODULE = "trainer.cli.sweep_slot"
CORES_VARIABLE = "TRAINER_SWEEP_CORES"
"""The cores of all slots, as a JSON list."""
LOCK_VARIABLE = "TRAINER_SWEEP_LOCK"
"""Descriptor of the lock that the slot holds already."""
ENDED_VARIABLE = "TRAINER_SWEEP_ENDED"
"""Number of the trial that this process has trained last."""
_started: list[subprocess.Popen[bytes]] = []


def most_slots(spec: Spec) -> int:
    """Return how many trials this machine runs at the same time: `at_once`, else as many as have devices."""
    if spec.at_once is not None:
        return spec.at_once
    if spec.gpus:
        from trainer.core.gpus import inventory

        return max(1, inventory().most // spec.gpus)
    return max(1, len(_cores()) // spec.world_size)


def start_slots(sweep: SweepDirectory, spec: Spec, found: list[TrialView]) -> int:
    """Start the slots that are free as long as there are trials for them, and return how many were started."""
    wanted = len(decide.claimable(found))
    step = decide.next_step(spec, found, is_stopped=sweep.stop_request.exists())
    if step.claim is None and step.ask is None:
        return 0
    if spec.method in ADAPTIVE:
        end = spec.trials if spec.generation is None else min(spec.trials, _end_of_generation(spec, len(found)))
        wanted += max(0, end - len(found))
    started = 0
    for slot in range(most_slots(spec)):
        if started == wanted:
            break
        if _is_free(sweep, slot):
            _start(sweep, spec, slot)
            started += 1
    return started


def _end_of_generation(spec: Spec, decided: int) -> int:
    size = spec.generation or 1
    return (decided // size + 1) * size


def _start(sweep: SweepDirectory, spec: Spec, slot: int) -> None:
    log = log_path(sweep, slot)
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    for name in (LOCK_VARIABLE, ENDED_VARIABLE):
        environment.pop(name, None)
    environment.setdefault(CORES_VARIABLE, records.dumps(_cores()))
    with log.open("ab") as file:
        process = subprocess.Popen(
            processes.python_module(MODULE, str(sweep.path), str(slot)),
            cwd=spec.cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    _started.append(process)  # a Popen that is garbage-collected while its process runs issues a warning


def log_path(sweep: SweepDirectory, slot: int) -> Path:
    """Return the log of a slot."""
    return sweep.logs_dir / f"slot-{slot}.log"


def take(sweep: SweepDirectory, slot: int) -> int | None:
    """Take the lock of a slot, and return its descriptor; None if another process has it.

    On a file system without locks more slots than wanted may run; each trial still has one owner.
    """
    held = os.environ.get(LOCK_VARIABLE)
    if held is not None:
        return int(held)
    descriptor = os.open(_lock_path(sweep, slot), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if try_lock(descriptor) is False:
        os.close(descriptor)
        return None
    os.set_inheritable(descriptor, True)  # through exec(2); children of the node process close it
    return descriptor


def _is_free(sweep: SweepDirectory, slot: int) -> bool:
    descriptor = os.open(_lock_path(sweep, slot), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        return try_lock(descriptor) is not False
    finally:
        os.close(descriptor)


def _lock_path(sweep: SweepDirectory, slot: int) -> Path:
    return sweep.slots_dir / f"slot-{slot}.lock"


def _cores() -> list[int]:
    written = os.environ.get(CORES_VARIABLE)
    if written:
        return records.loads(list[int], written, f"the variable {CORES_VARIABLE}")
    return sorted(os.sched_getaffinity(0))


def pin(spec: Spec, slot: int) -> None:
    """Give this process its share of the cores, if each slot gets at least one and the trials train on CPU."""
    cores, slots = _cores(), most_slots(spec)
    share = min(len(cores), usable_cores()) // slots
    if spec.gpus == 0 and slots > 1 and share >= 1 and slot < slots:
        os.sched_setaffinity(0, cores[slot * share : (slot + 1) * share])
