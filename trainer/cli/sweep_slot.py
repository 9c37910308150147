"""A slot of a local sweep: `python -m trainer.cli.sweep_slot SWEEP_DIR SLOT`.

It records what has ended, claims a trial, and becomes the node process of its run; that becomes this again at its end.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.cli.sweep_trial import begin, clear_environment, home
from trainer.core import claims, processes, records
from trainer.core.claims import free_gpus
from trainer.core.errors import DONE, TrainerError
from trainer.core.gpus import inventory
from trainer.launch.local import NODE
from trainer.runs.directory import RunDirectory
from trainer.supervise.node import record_launch
from trainer.supervise.variables import THEN_VARIABLE
from trainer.sweeps import slots
from trainer.sweeps.advance import Claim, acquire, fail
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import settle, views
from trainer.sweeps.records import Spec

_CLAIM_VARIABLE = "TRAINER_SWEEP_CLAIM"
"""`HeldGpus`, as JSON."""
_WAIT_S, _POLL_S = 600.0, 5.0
"""How long a slot waits for GPUs that another program is about to free."""


@dataclass(frozen=True, kw_only=True)
class HeldGpus:
    """What a slot keeps for itself through the node process that it becomes."""

    locks: list[int]
    """Descriptors of the locks of the GPUs."""
    before: dict[str, str | None]
    """The variables that were replaced to show the GPUs, with their values; null: it was not set."""


def main(arguments: list[str]) -> int:
    """Run a slot until its sweep has no trial for it, and return the exit code."""
    sweep, slot = SweepDirectory(Path(arguments[0])), int(arguments[1])
    _log_to(slots.log_path(sweep, slot))
    _reap()
    _release_gpus()
    spec = sweep.spec()
    home(spec)
    ended = os.environ.pop(slots.ENDED_VARIABLE, None)
    finished = frozenset() if ended is None else frozenset({int(ended)})
    if ended is not None:
        _forget_process(sweep, int(ended))
    lock = slots.take(sweep, slot)
    if lock is None:
        return DONE
    slots.pin(spec, slot)
    while True:
        claim = _next(sweep, spec, finished)
        if isinstance(claim, Claim):
            finished = frozenset()
            try:
                run = begin(sweep, claim)
            except TrainerError as error:
                print(f"trial {claim.trial.number}: {error}", flush=True)
                fail(sweep, claim, error)
                continue
            try:
                _train(sweep, claim, run, slot=slot, lock=lock)  # returns only with an error
            except TrainerError as error:  # somebody was faster to take the GPUs
                print(f"trial {claim.trial.number}: {error}", flush=True)
                claim = error.message
        print(f"slot {slot} ends: {claim or 'no trial is left'}", flush=True)
        os.close(lock)
        os.environ.pop(slots.LOCK_VARIABLE, None)
        # A trial that ended between the look and the release of the lock found this slot busy.
        slots.start_slots(sweep, sweep.spec(), settle(sweep, spec, views(sweep, None)))
        return DONE


def _next(sweep: SweepDirectory, spec: Spec, finished: frozenset[int]) -> Claim | str:
    """Claim a trial once there are GPUs for it; start the other slots that have work now."""
    found = settle(sweep, spec, views(sweep, None, finished))
    deadline = time.monotonic() + _WAIT_S
    while spec.gpus and free_gpus(inventory()) < spec.gpus:
        if time.monotonic() > deadline:
            return f"{spec.gpus} GPUs did not become free"
        time.sleep(_POLL_S)
    claim = acquire(sweep, ended=finished)
    if finished:
        found = settle(sweep, spec, views(sweep, None))
        slots.start_slots(sweep, spec, found)
    return claim


def _train(sweep: SweepDirectory, claim: Claim, run: RunDirectory, *, slot: int, lock: int) -> None:
    """Become the node process of the run."""
    attempt = run.next_attempt()
    record_launch(run, run.shape(), os.getpid(), attempt)
    print(f"slot {slot}: trial {claim.trial.number} is {run.path.name}, attempt {attempt}", flush=True)
    if claim.spec.prune is not None:
        from trainer.cli.sweep_watch import start

        start(sweep, claim.trial.number, run)
    environment = clear_environment(dict(os.environ))
    environment |= {slots.LOCK_VARIABLE: str(lock), slots.ENDED_VARIABLE: str(claim.trial.number)}
    environment[THEN_VARIABLE] = records.dumps(
        processes.python_module("trainer.cli.sweep_slot", str(sweep.path), str(slot))
    )
    environment["TRAINER_ATTEMPT"] = str(attempt)
    environment |= _claim_gpus(run)
    command = processes.python_module(NODE, str(run.path))
    with (run.logs_dir / "launch.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.execve(command[0], command, environment)


def _claim_gpus(run: RunDirectory) -> dict[str, str]:
    """Lock GPUs for the run, and return the variables of its node process, whose locks outlive exec(2).

    Raises:
        EnvironmentFault: Too few GPUs are free.
    """
    shape = run.shape()
    if shape.device != "cuda":
        return {}
    claim = claims.claim(shape.processes_per_node, run.config()["resources"].get("devices"))
    for lock in claim.locks:
        os.set_inheritable(lock, True)
    variables = claim.variables()
    before = {name: os.environ.get(name) for name in variables}
    return {**variables, _CLAIM_VARIABLE: records.dumps(HeldGpus(locks=claim.locks, before=before))}


def _release_gpus() -> None:
    """Unlock the GPUs of the trial that has ended, and restore the variables that showed them."""
    written = os.environ.pop(_CLAIM_VARIABLE, None)
    if written is None:
        return
    held = records.loads(HeldGpus, written, f"the variable {_CLAIM_VARIABLE}")
    for lock in held.locks:
        os.close(lock)
    for name, value in held.before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _forget_process(sweep: SweepDirectory, number: int) -> None:
    """Remove this process from the launch of the trial that it has trained: it lives on, and no longer trains it."""
    names = sweep.names().get(number)
    record = sweep.run_of(number, names.runs[-1]) if names and names.runs else None
    if record is None:
        return
    run = RunDirectory(Path(record.path))
    launch = run.launch()
    if launch.pid == os.getpid():
        from dataclasses import replace

        run.write_launch(replace(launch, pid=None, pid_started=None))


def _log_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _reap() -> None:
    """Collect the children that this process had as the node process of a trial."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
