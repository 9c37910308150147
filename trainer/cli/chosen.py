"""Which checkpoint a command means, and the processes in which it works on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer.checkpoint import commit
from trainer.checkpoint.store import Checkpoint, CheckpointStore, best_of
from trainer.config.instantiate import read_whole
from trainer.config.shape import LaunchShape, resolve
from trainer.core.errors import JOB_FAILED, TrainerError, UserError
from trainer.core.files import read_json, read_live
from trainer.runs import cause
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import reference_to, shortest
from trainer.supervise import entry, torchrun
from trainer.supervise.torchrun import Place


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
        raise UserError(
            f"{run.path.name} has no checkpoint", f"trainer why {reference_to(run)} says why; or choose another run"
        )
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


def run_on_ranks(
    run: RunDirectory, module: str, arguments: list[str], ranks: int | None = None, quiet: bool = False
) -> None:
    """torchrun of `module` with the run directory and `arguments` on this machine, in the foreground.

    The run's own shape, or with `ranks` that many processes on its kind of device. What the user's code prints is shown
    (on stderr if `quiet`, for stdout is a command's JSON then); warnings and tracebacks go to `logs/VERB.log`.
    Raises TrainerError with the message of the rank that failed first.
    """
    verb = module.rpartition(".")[2]
    launch = run.launch()
    shape = LaunchShape.from_dict(launch["shape"]) if launch.get("shape") else resolve(read_whole(run.config_path))
    if ranks is not None:
        shape = LaunchShape(1, ranks, shape.device)
    command = torchrun.command(run.path, f"{run.id}-{verb}", shape, Place(), 0, entry.started(module, run.code_dir))
    variables = torchrun.environment(
        os.environ, run.code_dir, shape, Place(), 0, entry.module_of(module, run.code_dir), run.hash_seed()
    )
    with logged(run.logs_dir / f"{verb}.log", variables) as log:
        child = torchrun.start([*command, *arguments], variables, stdout=sys.stderr if quiet else None, stderr=log)
        try:
            code = child.wait()
        finally:
            child.kill()  # Ctrl-C: it ignores SIGINT, and its workers die with it
            child.wait()
    raise_failure(code, f"trainer {verb} of {run.path.name}", Path(log.name), variables)


@contextmanager
def logged(path: Path, variables: dict[str, str]) -> Iterator[TextIO]:
    """A new log, and in `variables` where a rank writes what it fails of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    variables[cause.FAILURE_VARIABLE] = str(path.with_suffix(".failure.json"))
    Path(variables[cause.FAILURE_VARIABLE]).unlink(missing_ok=True)
    with path.open("w") as log:
        yield log


def raise_failure(code: int, what: str, log: Path, variables: dict[str, str]) -> None:
    """Unless `code` is 0: TrainerError with what a process wrote of its failure, and where the log is."""
    if code == 0:
        return
    told = read_json(Path(variables[cause.FAILURE_VARIABLE]), {})
    where = f"the log is {shortest(log)}"
    if not told:
        lines = [line for line in cause.tail(log) if line.strip()]
        how = f"killed by {cause.signal_name(-code)}" if code < 0 else f"exit {code}"
        raise TrainerError(f"{what} failed ({how})", "\n  ".join([*lines[-3:], where]))
    error = TrainerError(told["message"], "\n  ".join(filter(None, [told["fix"], where])))
    error.code = told["code"]
    if error.code != JOB_FAILED:  # ours: it says what to do, and the log knows no more
        error.fix = told["fix"]
    raise error
