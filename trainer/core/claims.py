"""Choose the GPUs of a job on this machine: those that nobody uses, and those that the user names.

A choice is locked until the job ends, so that two jobs that start at the same moment do not take the same, whoever
starts them. Other programs are seen by their processes.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.gpu import Gpu
from trainer.core.gpus import ON_CPU, Inventory, inventory
from trainer.core.locks import locked_or_closed

CLAIMED_VARIABLE = "TRAINER_GPUS"
"""The GPUs that were chosen for this process, as text; unset: none were."""
WAIT_S = 5.0
"""Time that memory of a job that has just ended may take to be free."""
_POLL_S = 0.5
_FOLDER = Path("/tmp")
"""Of the locks. Not TMPDIR, which differs between users, shells and jobs."""
_TRIES = 5


@dataclass
class Claim:
    """GPUs that are reserved for a job while `locks` are open, in this process or in a child."""

    gpus: list[Gpu]
    left_out: list[str]
    """GPUs that were not taken, and who uses them."""
    locks: list[int] = field(default_factory=list)
    """Descriptors."""

    def __str__(self) -> str:
        named = ", ".join(map(str, self.gpus))
        names = "" if not self.gpus else f" ({self.gpus[0].name})"
        left_out = f"; not {'; '.join(self.left_out)}" if self.left_out else ""
        return f"GPU{'s' * (len(self.gpus) > 1)} {named}{names}{left_out}"

    def variables(self) -> dict[str, str]:
        """Return the variables that show a process these GPUs and no others."""
        entries = ",".join(gpu.entry for gpu in self.gpus)
        chosen = {CLAIMED_VARIABLE: str(self)}
        if self.gpus and self.gpus[0].kind == "rocm":
            return {**chosen, "HIP_VISIBLE_DEVICES": entries}
        variables = {**chosen, "CUDA_VISIBLE_DEVICES": entries}
        # The numbers are those of nvidia-smi; by default CUDA numbers GPUs of several types by speed.
        return variables if self._are_as_given else {**variables, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    _are_as_given: bool = False
    """Whether the entries are from CUDA_VISIBLE_DEVICES, and so numbered as it is."""

    def release(self) -> None:
        """Close the locks in this process."""
        for descriptor in self.locks:
            os.close(descriptor)
        self.locks = []


def claim(
    count: int,
    devices: Sequence[int | str] | None = None,
    *,
    is_strict: bool = True,
    here: Inventory | None = None,
    environment: Mapping[str, str] = os.environ,
    wait_s: float = WAIT_S,
) -> Claim:
    """Choose and lock `count` GPUs of this machine.

    Args:
        count: Number of GPUs, one per process.
        devices: `resources.devices`; they are taken even if somebody uses them.
        is_strict: Whether to refuse GPUs that are in use; else they are taken if there are no others.
        here: The GPUs of this machine; None: look.
        environment: The environment of the job. GPUs that CUDA_VISIBLE_DEVICES names are taken like `devices`, unless
            it names more than `count`.
        wait_s: Longest time to wait for GPUs in use.

    Raises:
        UserError: `devices` names a GPU that is not there.
        EnvironmentFault: There are too few GPUs that nobody uses.
    """
    deadline = time.monotonic() + wait_s
    while True:
        found = here or inventory(environment)
        if found.problem is not None:
            raise found.problem
        if devices is not None:
            return _taken(named(found.gpus, devices), found)
        if found.is_chosen and len(found.gpus) == count:
            return _taken(list(found.gpus), found)
        chosen = _free(found, count)
        if len(chosen.gpus) == count:
            return chosen
        chosen.release()
        if not is_strict and len(found.gpus) >= count:
            return _taken(list(found.gpus[:count]), found)
        if time.monotonic() >= deadline:
            raise _too_few(count, chosen, found)
        time.sleep(_POLL_S)


def named(gpus: Sequence[Gpu], devices: Sequence[int | str]) -> list[Gpu]:
    """Return the GPUs with these numbers or UUIDs.

    Raises:
        UserError: There is none, or one is named twice.
    """
    chosen: list[Gpu] = []
    for device in map(str, devices):
        fitting = [
            gpu
            for gpu in gpus
            if (device.isdigit() and gpu.index == int(device) and not gpu.is_mig)
            or (device.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(device))
        ]
        if len(fitting) != 1 or fitting[0] in chosen:
            there = ", ".join(map(str, gpus)) or "none"
            why = "is named twice" if fitting and fitting[0] in chosen else "is not a GPU that this process may use"
            raise UserError(f"resources.devices: {device} {why}", f"choose from: {there}")
        chosen.append(fitting[0])
    if len(chosen) > 1 and any(gpu.is_mig for gpu in chosen):
        raise UserError("resources.devices: CUDA shows a process one MIG instance only", "name one")
    return chosen


def _taken(gpus: list[Gpu], found: Inventory) -> Claim:
    """Lock GPUs that were named, as far as nobody else has locked them."""
    locks = [descriptor for gpu in gpus if (descriptor := _lock(gpu)) is not None]
    return Claim(gpus, [], locks, _are_as_given=found.is_chosen)


def _free(found: Inventory, count: int) -> Claim:
    """Lock up to `count` GPUs that nobody uses. A MIG instance is only taken alone, and if there is no whole GPU."""
    chosen = Claim([], list(found.notes), _are_as_given=found.is_chosen)
    for gpu in sorted(found.gpus, key=lambda one: one.is_mig):
        if len(chosen.gpus) == count or (gpu.is_mig and chosen.gpus):
            break
        if gpu.holder is not None:
            chosen.left_out.append(f"{gpu}: in use by {gpu.holder}")
            continue
        descriptor = _lock(gpu)
        if descriptor is None:
            chosen.left_out.append(f"{gpu}: taken by another run")
            continue
        chosen.gpus.append(gpu)
        chosen.locks.append(descriptor)
        if gpu.is_mig:
            break
    return chosen


def _too_few(count: int, chosen: Claim, found: Inventory) -> EnvironmentFault:
    free = len(chosen.gpus)
    message = f"{count} GPU{'s' * (count > 1)} requested, and {free} of {len(found.gpus)} free"
    some = ",".join(str(gpu.index) for gpu in found.gpus[:count])
    fix = f"{'; '.join(chosen.left_out)}\n  wait, or take them all the same: resources.devices=[{some}]; {ON_CPU}"
    return EnvironmentFault(message, fix)


def free_gpus(found: Inventory) -> int:
    """Return how many of these GPUs a job can take now: those that nobody uses, or all that the environment names."""
    if found.is_chosen:
        return found.most
    free = [gpu for gpu in found.gpus if gpu.holder is None and not _is_locked(gpu)]
    return Inventory(tuple(free)).most


def _lock(gpu: Gpu) -> int | None:
    """Return the descriptor of the lock of a GPU, which a child may inherit; None if it is taken."""
    descriptor = _open(_FOLDER / f"trainer-gpu-{gpu.key.replace('/', '_')}.lock")
    if descriptor is None:
        return os.open(os.devnull, os.O_RDONLY)  # without locks a job sees the others by their processes only
    return locked_or_closed(descriptor)


def _open(path: Path) -> int | None:
    """Return a descriptor of a file that all users can lock, made if it is missing; None if it cannot be used.

    Nobody writes to it, and a lock needs no more than reading. In a folder with the sticky bit only its owner can
    remove it. Where somebody has put something else in its place, there is no lock.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(_TRIES):
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            try:
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue
            except OSError:
                return None
            os.fchmod(descriptor, 0o644)  # whatever the umask is
        except PermissionError:  # made a moment ago, with a umask that lets nobody read it yet
            time.sleep(0.01)
            continue
        except OSError:
            return None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        return None
    return None


def _is_locked(gpu: Gpu) -> bool:
    descriptor = _lock(gpu)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None
