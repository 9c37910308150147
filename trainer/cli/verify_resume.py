"""`trainer verify-resume [key=value ...]`: check that a killed and resumed job ends bit for bit the same."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from trainer.cli.options import make_parser
from trainer.core.errors import DONE, JOB_FAILED, UserError
from trainer.faultbench.bench import Comparer, command, is_finished, lost_steps
from trainer.faultbench.diagnosis import diagnose, steps_per_epoch
from trainer.runs.directory import RunDirectory

_DESCRIPTION = (
    "Train this configuration past the end of an epoch, and train it again with kills at random times: of all ranks, "
    "which are restarted, and of the whole job, which is resumed. Then compare the samples, weights, optimizer, "
    "schedulers, callbacks and random number generators of the two runs. The exit code is 0 if they are equal bit for "
    "bit; else it is 1, and the first difference and its likely cause are printed."
)
STEPS = 20
"""Minimum number of optimizer steps of a run if --steps is not given."""
_UNDISTURBED, _KILLED = "unharmed", "killed"
"""Folders of the runs."""
MAX_STEPS = 300
"""A longer epoch is not trained to its end if --steps is not given."""


def main(argv: list[str]) -> int:
    """Run `trainer verify-resume` and return the exit code."""
    options = _parse(argv)
    if options.steps is not None and options.steps < 3:
        raise UserError(f"--steps {options.steps}: too few to kill a job in between", "use --steps 10 or more")
    if options.kills < 1:
        raise UserError(f"--kills {options.kills} must be at least 1", "leave it out for 2 kills")
    folder = Path(options.keep or tempfile.mkdtemp(prefix="trainer-verify-")).absolute()
    for name in (_UNDISTURBED, _KILLED):
        if os.path.lexists(folder / name):
            raise UserError(f"--keep {options.keep}: {folder / name} already exists", "name a new folder")
    undisturbed = _train_undisturbed(options, folder)
    last = int(undisturbed.attempts()[-1].step or 0)
    if note := gpu_note(undisturbed.config()):
        print(note, flush=True)
    kills = _kills(options, last, steps_per_epoch(undisturbed))
    killed = _train(options, folder / _KILLED, kills)
    attempts = len(killed.logged_attempts())
    print(f"kills: {attempts - 1}; repeated steps: {lost_steps(killed)}", flush=True)
    comparer = Comparer()
    try:
        difference = comparer.difference(killed.path, undisturbed.path, last)
    finally:
        comparer.close()
    if difference is None:
        print("equal bit for bit: samples, weights, optimizer, schedulers, callbacks, random number generators")
        if not options.keep:
            shutil.rmtree(folder)
        return DONE
    _explain(killed, undisturbed, difference)
    return JOB_FAILED


def gpu_note(config: dict[str, Any]) -> str | None:
    """Return the note for a job on GPUs that may use nondeterministic kernels; None for any other."""
    if not config["resources"].get("gpus") or config["trainer"].get("deterministic") is True:
        return None
    return (
        "note: this job runs on GPUs without trainer.deterministic=true, so two runs may differ in the last bits even"
        " without a kill; add trainer.deterministic=true to tell that from an inexact resume"
    )


def _explain(killed: RunDirectory, undisturbed: RunDirectory, difference: str) -> None:
    diagnosis = diagnose(killed, undisturbed)
    if diagnosis is None:
        print(f"first difference: {difference}, at the end; every batch before it is equal")
    else:
        print(f"first difference: {diagnosis.where}: {diagnosis.what}")
        if diagnosis.also:
            print(f"  also different there: {diagnosis.also}")
        if diagnosis.effect:
            print(f"  effect: {diagnosis.effect}")
        print(f"  likely cause: {diagnosis.reason}")
        print(f"  at the end: {difference}")
    print(f"  the runs: {undisturbed.path} and {killed.path}")


def _train_undisturbed(options: argparse.Namespace, folder: Path) -> RunDirectory:
    """Train without kills. Sets `options.steps` so that the run goes past the end of an epoch, if it was not given."""
    given = options.steps
    options.steps = given or STEPS
    run = _train(options, folder / _UNDISTURBED, [])
    epoch = steps_per_epoch(run)
    past_epoch = 0 if epoch is None else epoch + max(3, min(STEPS, epoch // 2))
    if given is None and options.steps < past_epoch <= MAX_STEPS:
        shutil.rmtree(folder / _UNDISTURBED)
        options.steps = past_epoch
        run = _train(options, folder / _UNDISTURBED, [])
    length = "epochs of unknown length"
    if epoch is not None and epoch < options.steps:
        length = f"past the end of an epoch of {epoch}"
    elif epoch is not None:
        length = f"not to the end of an epoch of {epoch}; for that use --steps {epoch + STEPS}"
    print(f"{options.steps} steps ({length}), {options.kills} kills, seed {options.seed}; runs in {folder}", flush=True)
    return run


def _parse(argv: list[str]) -> argparse.Namespace:
    example = "trainer verify-resume experiment=quickstart --steps 30"
    parser = make_parser("verify-resume", _DESCRIPTION, example, allow_abbrev=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, as for trainer fit")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"optimizer steps of each run (default: {STEPS}, or past the end of an epoch of up to {MAX_STEPS})",
    )
    parser.add_argument("--kills", type=int, default=2, metavar="N", help="number of kills (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the times of the kills (default: 0)")
    parser.add_argument(
        "--keep", metavar="DIR", help="directory of the runs, which are kept (default: a temporary directory)"
    )
    options: argparse.Namespace = parser.parse_intermixed_args(argv)
    return options


def _kills(options: argparse.Namespace, last: int, epoch: int | None) -> list[tuple[str, int]]:
    """Draw the kills: (kind, step) for attempt 0, 1, and so on.

    Each kills all ranks at any place inside a step; the last one kills the whole job. The first is in the first epoch,
    so that a resumed attempt passes the end of the epoch.
    """
    choose = random.Random(options.seed)
    first = min(last, epoch or last) - 1
    steps = sorted([choose.randint(1, max(1, first)), *choose.choices(range(1, last), k=options.kills - 1)])
    kinds = ["kill"] * (options.kills - 1) + ["kill_all" if options.kills > 1 else "kill"]
    return list(zip(kinds, steps[: options.kills], strict=True))


def _faults(kills: list[tuple[str, int]]) -> list[str]:
    overrides = [f"resilience.max_restarts={len(kills) + 1}"]
    for attempt, (kind, step) in enumerate(kills):
        where = f"++callbacks.verify_{attempt}"
        overrides += [
            f"{where}._target_=trainer.faultbench.inject.InjectFault",
            f"{where}.kind={kind}",
            f"{where}.step={step}",
            # One rank kills the whole job: a second one would find no node process.
            f"{where}.ranks={[0] if kind == 'kill_all' else []}",
            f"{where}.attempt={attempt}",
        ]
    return overrides


def _train(options: argparse.Namespace, runs_dir: Path, kills: list[tuple[str, int]]) -> RunDirectory:
    overrides = [
        *options.overrides,
        f"runs_dir={runs_dir}",
        f"trainer.max_steps={options.steps}",
        f"checkpoint.every_n_steps={max(1, options.steps // 5)}",
        "checkpoint.keep_last=1000",
        "tracking=none",
        "cluster=local",
        "++callbacks.sample_log._target_=trainer.callbacks.samples.SampleLog",
        "++callbacks.resume_trace._target_=trainer.faultbench.trace.ResumeTrace",
        *(_faults(kills) if kills else []),
    ]
    output = ""
    try:
        done = command(["fit", *overrides], Path.cwd(), timeout_s=3600)
        output = done.stdout + done.stderr
        run = _only_run(runs_dir)
        if run is not None and not is_finished(run) and any(kind == "kill_all" for kind, _ in kills):
            done = command(["resume", run.id, "--runs-dir", str(runs_dir)], Path.cwd(), timeout_s=3600)
            output += done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        raise UserError("the training takes more than an hour", "use fewer --steps, or a smaller data set") from None
    if run is None or not is_finished(run):
        print(output[-4000:])
        when = "killed and resumed" if kills else "undisturbed"
        raise UserError(f"the job did not finish ({when}); its output is above", "make `trainer fit` work first")
    return run


def _only_run(runs_dir: Path) -> RunDirectory | None:
    paths = sorted(runs_dir.glob("*")) if runs_dir.exists() else []
    return RunDirectory(paths[0]) if len(paths) == 1 else None
