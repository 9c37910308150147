"""`trainer evaluate [RUN]`: the metrics of one of a run's checkpoints on held-out data."""

from __future__ import annotations

import argparse
import json
import os
import sys

from trainer.checkpoint.store import Checkpoint, CheckpointStore
from trainer.cluster import torchrun
from trainer.cluster.shape import LaunchShape, resolve
from trainer.cluster.torchrun import Place
from trainer.errors import JOB_FAILED, UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.files import read_json
from trainer.runs.registry import find, runs_dir_from

_EXAMPLE = "example: trainer evaluate k3v9 --split test --checkpoint best"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer evaluate", description=__doc__, epilog=_EXAMPLE)
    parser.add_argument("run", nargs="?", help="id, prefix, name or path; the latest without it")
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|STEP")
    parser.add_argument("--runs-dir", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    checkpoint = _choose(run, options.checkpoint)
    code = _launch(run, checkpoint.step, options.split)
    if code != 0:
        print(f"trainer: the evaluation of {run.path.name} failed (exit {code})", file=sys.stderr)
        return JOB_FAILED
    record = read_json(run.path / "evaluations" / f"step-{checkpoint.step:08d}-{options.split}.json")
    if options.json:
        print(json.dumps(record))
    else:
        print(f"{run.path.name}, step {checkpoint.step}:")
        for name, value in sorted(record["metrics"].items()):
            print(f"  {name:<20}{value:.4f}")
    return 0


def _choose(run: RunDirectory, which: str) -> Checkpoint:
    """A committed checkpoint by step, the newest, or the one with the best monitored metric."""
    committed = CheckpointStore(run.checkpoints_dir).committed()
    if not committed:
        raise UserError(f"{run.path.name} has no checkpoint", "trainer resume it, or choose another run")
    if which == "last":
        return committed[-1]
    if which == "best":
        best = (read_json(run.live_dir / "rank-0.json", {}).get("best") or {}).get("mode", "min")
        measured = [checkpoint for checkpoint in committed if checkpoint.monitor_value is not None]
        sign = 1 if best == "max" else -1
        return max(measured, key=lambda found: sign * (found.monitor_value or 0.0)) if measured else committed[-1]
    for checkpoint in committed:
        if str(checkpoint.step) == which:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in committed)
    raise UserError(
        f"--checkpoint={which}: {run.path.name} has no such checkpoint", f"use best, last, or one of {steps}"
    )


def _launch(run: RunDirectory, step: int, split: str) -> int:
    """torchrun with the run's own shape, on this machine, in the foreground."""
    config = run.config()
    launch = run.launch()
    shape = LaunchShape.from_dict(launch["shape"]) if launch.get("shape") else resolve(config)
    arguments = torchrun.command(run.path, f"{run.id}-evaluate", shape, Place(), 0, "trainer.worker.evaluate")
    variables = torchrun.environment(os.environ, run.code_dir, shape, Place(), 0)
    child = torchrun.start([*arguments, str(step), split], variables)
    try:
        return child.wait()
    finally:
        child.kill()  # Ctrl-C: it ignores SIGINT, and its workers die with it
        child.wait()
