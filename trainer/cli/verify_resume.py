"""`trainer verify-resume [key=value ...]`: does a job of this configuration survive being killed, bit for bit?"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from trainer.core.errors import DONE, JOB_FAILED, UserError
from trainer.faultbench.bench import Comparer, command, is_finished, lost_steps
from trainer.faultbench.diagnosis import diagnose, steps_per_epoch
from trainer.runs.directory import RunDirectory

_DESCRIPTION = """Train this configuration past the end of an epoch, train it again with kills at random moments (all
ranks, which are restarted, and the whole job, which is resumed), and compare what the two end with: samples, weights,
optimizer, schedules, callbacks, random number generators. Ends with 0 when they are equal bit for bit, else with 1,
what differs first in the order of the steps, and its likely reason."""
STEPS = 20
"""At least, unless --steps says otherwise."""
MOST_STEPS = 300
"""An epoch that takes more is not trained to its end, unless --steps says so."""


def main(argv: list[str]) -> int:
    options = _parse(argv)
    if options.steps is not None and options.steps < 3:
        raise UserError(f"--steps {options.steps}: too few to be killed in between", "use --steps 10 or more")
    if options.kills < 1:
        raise UserError(f"--kills {options.kills}: nothing would be killed", "use --kills 1 or more")
    folder = Path(options.keep or tempfile.mkdtemp(prefix="trainer-verify-")).absolute()
    unharmed = _unharmed(options, folder)
    last = int(unharmed.attempts()[-1]["step"])
    kills = _kills(options, last, steps_per_epoch(unharmed.path))
    killed = _train(options, folder / "killed", kills)
    attempts = len(list(killed.logs_dir.glob("attempt-*")))
    print(f"kills that hit: {attempts - 1}; steps done again: {lost_steps(killed)}", flush=True)
    comparer = Comparer()
    try:
        difference = comparer.difference(killed.path, unharmed.path, last)
    finally:
        comparer.close()
    if difference is None:
        print("equal bit for bit: samples, weights, optimizer, schedules, callbacks, random number generators")
        if not options.keep:
            shutil.rmtree(folder)
        return DONE
    _explain(killed, unharmed, difference)
    return JOB_FAILED


def _explain(killed: RunDirectory, unharmed: RunDirectory, difference: str) -> None:
    found = diagnose(killed.path, unharmed.path)
    if found is None:
        print(f"first difference: {difference}, at the end; every batch before it went as in the other run")
    else:
        print(f"first difference: {found.where}: {found.what}")
        if found.also:
            print(f"  also there: {found.also}")
        if found.effect:
            print(f"  effect: {found.effect}")
        print(f"  likely reason: {found.reason}")
        print(f"  at the end: {difference}")
    print(f"  the runs: {unharmed.path} and {killed.path}")


def _unharmed(options: argparse.Namespace, folder: Path) -> RunDirectory:
    """The run that nothing happens to; sets `options.steps` so that it goes past the end of an epoch."""
    asked = options.steps
    options.steps = asked or STEPS
    run = _train(options, folder / "unharmed", [])
    epoch = steps_per_epoch(run.path)
    wanted = 0 if epoch is None else epoch + max(3, min(STEPS, epoch // 2))
    if asked is None and options.steps < wanted <= MOST_STEPS:
        shutil.rmtree(folder / "unharmed")
        options.steps = wanted
        run = _train(options, folder / "unharmed", [])
    ends = "an epoch has no known end"
    if epoch is not None and epoch < options.steps:
        ends = f"an epoch has {epoch}: its end is passed"
    elif epoch is not None:
        ends = f"an epoch has {epoch}: its end is not reached; --steps {epoch + STEPS} would"
    print(f"{options.steps} steps ({ends}), {options.kills} kills, seed {options.seed}; runs in {folder}", flush=True)
    return run


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trainer verify-resume",
        description=_DESCRIPTION,
        epilog="example: trainer verify-resume experiment=mine --steps 30",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for trainer fit")
    text = f"optimizer steps of each run; default: {STEPS}, or past the end of an epoch of up to {MOST_STEPS}"
    parser.add_argument("--steps", type=int, default=None, help=text)
    parser.add_argument("--kills", type=int, default=2, help="how often; default: 2")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--keep", metavar="DIR", help="where the runs are made, and stay")
    return parser.parse_intermixed_args(argv)


def _kills(options: argparse.Namespace, last: int, epoch: int | None) -> list[tuple[str, int]]:
    """(kind, step) for attempt 0, 1, ...: all ranks somewhere inside of a step; the last kill is of the whole job.

    The first falls into the first epoch, so that a resumed attempt passes its end.
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
            # One rank ends the whole job: for another the node process would be gone already.
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
    said = ""
    try:
        done = command(["fit", *overrides], Path.cwd(), timeout_s=3600)
        said = done.stdout + done.stderr
        run = _only_run(runs_dir)
        if run is not None and not is_finished(run) and any(kind == "kill_all" for kind, _ in kills):
            done = command(["resume", run.id, "--runs-dir", str(runs_dir)], Path.cwd(), timeout_s=3600)
            said += done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        raise UserError("the training takes more than an hour", "use fewer --steps, or a smaller data set") from None
    if run is None or not is_finished(run):
        print(said[-4000:])
        when = "killed and resumed" if kills else "undisturbed"
        raise UserError(f"the job did not finish ({when}); what it logged is above", "make `trainer fit` work first")
    return run


def _only_run(runs_dir: Path) -> RunDirectory | None:
    found = sorted(runs_dir.glob("*")) if runs_dir.exists() else []
    return RunDirectory(found[0]) if len(found) == 1 else None
