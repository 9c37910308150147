"""`trainer verify-resume [key=value ...]`: does a job of this configuration survive being killed, bit for bit?"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from trainer.errors import DONE, JOB_FAILED, UserError
from trainer.resilience.bench import Comparer, command, is_finished, lost_steps
from trainer.runs.directory import RunDirectory

_DESCRIPTION = """Train this configuration for a few steps, train it again and kill all its ranks at random moments,
and compare what the two end with: samples, weights, optimizer, random number generators. Ends with 0 when they are
equal bit for bit, else with 1 and the first thing that differs."""
_CAUSES = (
    (r"^samples", "the order of the data is not resumed: a loader or sampler of your own, or an iterable dataset"),
    (r"RngState|rng", "something draws random numbers outside of the training step, or as often as it is started"),
    (r"^model/.*(running_|num_batches)", "a buffer that is updated outside of the training step"),
    (r"^(model|optimizer)/", "an operation that does not give the same bits each time: trainer.deterministic=true"),
    (r"callbacks", "a callback whose state_dict does not hold all that it needs"),
)
"""What the place of the first difference says about its cause."""


def main(argv: list[str]) -> int:
    options = _parse(argv)
    if options.steps < 3:
        raise UserError(f"--steps {options.steps}: too few to be killed in between", "use --steps 10 or more")
    folder = Path(options.keep or tempfile.mkdtemp(prefix="trainer-verify-")).absolute()
    print(f"{options.steps} steps, {options.kills} kills, seed {options.seed}; runs in {folder}", flush=True)
    unharmed = _train(options, folder / "unharmed", [])
    killed = _train(options, folder / "killed", _kills(options))
    attempts = len(list(killed.logs_dir.glob("attempt-*")))
    print(f"kills that hit: {attempts - 1}; steps done again: {lost_steps(killed)}", flush=True)
    comparer = Comparer()
    try:
        difference = comparer.difference(killed.path, unharmed.path, int(unharmed.attempts()[-1]["step"]))
    finally:
        comparer.close()
    if difference is None:
        print("equal bit for bit: samples, weights, optimizer, random number generators")
        if not options.keep:
            shutil.rmtree(folder)
        return DONE
    print(f"first difference: {difference}")
    cause = next((text for pattern, text in _CAUSES if re.search(pattern, difference)), None)
    if cause:
        print(f"  usual cause: {cause}")
    print(f"  the runs: {unharmed.path} and {killed.path}")
    return JOB_FAILED


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trainer verify-resume",
        description=_DESCRIPTION,
        epilog="example: trainer verify-resume experiment=mine --steps 30",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for trainer fit")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run; default: 20")
    parser.add_argument("--kills", type=int, default=2, help="how often; default: 2")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--keep", metavar="DIR", help="where the runs are made, and stay")
    return parser.parse_intermixed_args(argv)


def _kills(options: argparse.Namespace) -> list[str]:
    """Kill n of attempt n: every rank, somewhere inside of a step."""
    choose = random.Random(options.seed)
    overrides = [f"resilience.max_restarts={options.kills + 1}"]
    for attempt, step in enumerate(
        sorted(choose.sample(range(1, options.steps), min(options.kills, options.steps - 1)))
    ):
        where = f"++callbacks.verify_{attempt}"
        overrides += [
            f"{where}._target_=trainer.resilience.inject.InjectFault",
            f"{where}.kind=kill",
            f"{where}.step={step}",
            f"{where}.ranks=[]",
            f"{where}.attempt={attempt}",
        ]
    return overrides


def _train(options: argparse.Namespace, runs_dir: Path, more: list[str]) -> RunDirectory:
    overrides = [
        *options.overrides,
        f"runs_dir={runs_dir}",
        f"trainer.max_steps={options.steps}",
        f"checkpoint.every_n_steps={max(1, options.steps // 5)}",
        "checkpoint.keep_last=100",
        "tracking=none",
        "cluster=local",
        "++callbacks.sample_log._target_=trainer.callbacks.samples.SampleLog",
        *more,
    ]
    try:
        done = command(["fit", *overrides], Path.cwd(), timeout_s=3600)
    except subprocess.TimeoutExpired:
        raise UserError("the training takes more than an hour", "use fewer --steps, or a smaller data set") from None
    found = sorted(runs_dir.glob("*")) if runs_dir.exists() else []
    if len(found) != 1 or not is_finished(RunDirectory(found[0])):
        print(done.stdout[-2000:] + done.stderr[-2000:])
        raise UserError("the job did not finish, killed or not; what it said is above", "make `trainer fit` work first")
    return RunDirectory(found[0])
