"""Which checkpoint a command means, and the processes in which it works on it."""

from __future__ import annotations

import os

from trainer.checkpoint import commit
from trainer.checkpoint.store import Checkpoint, CheckpointStore, best_of
from trainer.cluster import torchrun
from trainer.cluster.shape import LaunchShape, resolve
from trainer.cluster.torchrun import Place
from trainer.errors import UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.files import read_live
from trainer.worker import start


def choose(run: RunDirectory, which: str) -> Checkpoint:
    """A committed checkpoint by step, the newest (`last`), or the one with the best monitored metric (`best`).

    Raises UserError where there is none, or where its checksums are wrong.
    """
    chosen = _chosen(run, which)
    problems = commit.verify(chosen.path)
    if problems:
        raise UserError(f"{chosen.path} is damaged: {'; '.join(problems)}", "use another: --checkpoint=STEP")
    return chosen


def _chosen(run: RunDirectory, which: str) -> Checkpoint:
    committed = CheckpointStore(run.checkpoints_dir).committed()
    if not committed:
        raise UserError(f"{run.path.name} has no checkpoint", "trainer resume it, or choose another run")
    if which == "last":
        return committed[-1]
    if which == "best":
        return best_of(committed, mode=fallback_mode(run)) or committed[-1]
    for checkpoint in reversed(committed):  # of a step the final one
        if str(checkpoint.step) == which:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in committed)
    raise UserError(
        f"--checkpoint={which}: {run.path.name} has no such checkpoint", f"use best, last, or one of {steps}"
    )


def fallback_mode(run: RunDirectory) -> str:
    """The direction of the monitored metric for checkpoints from before they said it themselves."""
    return str((read_live(run.live_dir / "rank-0.json").get("best") or {}).get("mode", "min"))


def run_on_ranks(run: RunDirectory, verb: str, arguments: list[str], ranks: int | None = None) -> int:
    """torchrun of `worker/start.py VERB RUN_DIR *arguments` on this machine, in the foreground; its exit code.

    The run's own shape, or with `ranks` that many processes on its kind of device.
    """
    launch = run.launch()
    shape = LaunchShape.from_dict(launch["shape"]) if launch.get("shape") else resolve(run.config())
    if ranks is not None:
        shape = LaunchShape(1, ranks, shape.device)
    command = torchrun.command(run.path, f"{run.id}-{verb}", shape, Place(), 0, [start.__file__, verb])
    seed = run.hash_seed()
    variables = torchrun.environment(os.environ, run.code_dir, shape, Place(), 0, f"trainer.worker.{verb}", seed)
    child = torchrun.start([*command, *arguments], variables)
    try:
        return child.wait()
    finally:
        child.kill()  # Ctrl-C: it ignores SIGINT, and its workers die with it
        child.wait()
