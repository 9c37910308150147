"""Kill the processes that advance a sweep, at moments drawn by a seed, and count what is lost or done twice.

    python benchmarks/sweep_faults.py --kills 200 --workers 4 --seed 0

Each worker does what a slot of a local sweep does: it claims a trial, makes or resumes its run, trains it and records
its result. The training is replaced by steps that append a line to the run, under a lock that fails if two processes
train the same run. A killed worker is followed by another at once. SIGKILL may hit any instruction.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from trainer.core import processes
from trainer.core.files import append_line, write_atomic
from trainer.runs.directory import RunDirectory, new_identity
from trainer.runs.records import AttemptOutcome, Launch
from trainer.sweeps import decide
from trainer.sweeps.advance import Claim, acquire
from trainer.sweeps.analysis import table_of
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import settle, views
from trainer.sweeps.records import Method, Parameter, Spec, TrialRun

STEPS, STEP_S = 5, 0.002
PARAMETERS = [
    Parameter(key="x", kind="float", low=-1.0, high=1.0),
    Parameter(key="y", kind="float", low=-1.0, high=1.0),
]
FAILS = 7
"""The trial that always fails."""


def make_sweep(folder: Path, trials: int, method: Method) -> SweepDirectory:
    """Create a sweep whose trials need no code."""
    sweep = SweepDirectory.new(folder / "sweeps", "faults")
    spec = Spec(
        revision=0,
        id=sweep.id,
        name="faults",
        command=[],
        fixed=[],
        parameters=PARAMETERS,
        method=method,
        trials=trials,
        metric=["val/loss"],
        direction=["minimize"],
        generation=4,
        startup_trials=4,
        cwd=str(folder),
        runs_dir=str(folder / "runs"),
    )
    if method in ("grid", "random", "sobol"):
        sweep.add_trials(decide.planned(spec, 0, trials))
    sweep.write_spec(spec)
    return sweep


def loss(values: dict[str, str]) -> float:
    """Return the value of a point: a function of it alone."""
    return (float(values["x"]) - 0.3) ** 2 + (float(values["y"]) + 0.2) ** 2


def work(sweep: SweepDirectory) -> None:
    """Train trials until none is left."""
    ended: frozenset[int] = frozenset()
    while True:
        claim = acquire(sweep, ended=ended)
        if isinstance(claim, Claim):
            train(sweep, claim)
            ended = frozenset({claim.trial.number})
            continue
        spec = sweep.spec()
        found = settle(sweep, spec, views(sweep, None, ended))
        if len(found) >= spec.trials and all(view.result for view in found):
            return
        time.sleep(0.005)


def train(sweep: SweepDirectory, claim: Claim) -> None:
    """Make or resume the run of a trial, and train it to its end."""
    run, number = claim.previous, claim.trial.number
    if run is None:
        planned = RunDirectory(Path(claim.spec.runs_dir) / f"faults-{new_identity()}")
        sweep.add_run(number, claim.owner, TrialRun(path=str(planned.path), first_attempt=0))
        run = RunDirectory.new(planned.path.parent, "faults", planned.id)
        write_atomic(run.config_path, json.dumps({"trial": number}))
        run.write_launch(Launch(cluster="local"))
    else:
        sweep.add_run(number, claim.owner, TrialRun(path=str(run.path), first_attempt=run.next_attempt()))
    attempt, me = run.next_attempt(), os.getpid()
    run.write_launch(replace(run.launch(), pid=me, pid_started=processes.started_ticks(me), attempt=attempt))
    run.attempt_logs(attempt).mkdir(parents=True)
    with (run.path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            append_line(sweep.path / "doubled", f"{number}")
            raise
        done = _steps(run)
        for step in range(done + 1, STEPS + 1):
            time.sleep(STEP_S)
            value = loss(claim.trial.values) + STEPS - step
            append_line(run.metrics_path, json.dumps({"step": step, "epoch": 0, "time": 0.0, "val/loss": value}))
        outcome = "failed" if number == FAILS else "finished"
        run.write_outcome(AttemptOutcome(attempt=attempt, outcome=outcome, reason="", step=STEPS))


def _steps(run: RunDirectory) -> int:
    return len(run.metrics_path.read_text().splitlines()) if run.metrics_path.exists() else 0


def start(sweep: SweepDirectory) -> int:
    """Fork a worker, and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work(sweep)
        code = 0
    finally:
        os._exit(code)


def harm(sweep: SweepDirectory, workers: int, kills: int, seed: int) -> int:
    """Run workers and kill them until all trials have ended; return the number of kills."""
    draw = random.Random(seed)
    living = [start(sweep) for _ in range(workers)]
    killed = 0
    while living:
        time.sleep(draw.uniform(0.0, 0.02))
        ended = [pid for pid in living if os.waitpid(pid, os.WNOHANG) != (0, 0)]
        living = [pid for pid in living if pid not in ended]
        if killed < kills and living:
            victim = draw.choice(living)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            living[living.index(victim)] = start(sweep)
            killed += 1
    return killed


def judge(sweep: SweepDirectory) -> dict[str, object]:
    """Return what the sweep ended with, and everything that is wrong with it."""
    spec = sweep.spec()
    found = settle(sweep, spec, views(sweep, None))
    wrong = []
    owners = 0
    paths: dict[str, int] = {}
    for view in found:
        owners += view.names.owners
        expected = "failed" if view.number == FAILS else "finished"
        if view.result is None or view.result.state != expected:
            wrong.append(f"trial {view.number} is {view.state}, not {expected}")
            continue
        for index in view.names.runs:
            record = sweep.run_of(view.number, index)
            run = RunDirectory(Path(record.path)) if record else None
            if run is not None and run.exists() and run.launch_path.exists():
                paths[str(run.path)] = view.number
                lines = run.metrics_path.read_text().splitlines() if run.metrics_path.exists() else []
                steps = [json.loads(line)["step"] for line in lines]
                if str(run.path) == view.result.run and steps != list(range(1, STEPS + 1)):
                    wrong.append(f"trial {view.number} trained the steps {steps}")
        trained = [
            path for path, number in paths.items() if number == view.number and (Path(path) / "metrics.jsonl").exists()
        ]
        if len(trained) != 1:
            wrong.append(f"trial {view.number} was trained in {len(trained)} runs")
    if len(found) != spec.trials:
        wrong.append(f"{len(found)} trials instead of {spec.trials}")
    if (sweep.path / "doubled").exists():
        wrong.append("two processes trained the same run")
    rows = table_of(sweep, spec, found)
    return {"trials": len(found), "owners": owners, "best": rows.ranked()[0].number, "wrong": wrong}


def main() -> int:
    """Print one line for each method, and return 0 if nothing was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=0, help="default: one for each kill")
    parser.add_argument("--methods", nargs="+", default=["random", "sobol", "tpe"])
    options = parser.parse_args()
    trials = options.trials or max(12, options.kills)
    failed = False
    for method in options.methods:
        if method == "tpe":
            from trainer.sweeps.adaptive import load

            load()
        with tempfile.TemporaryDirectory() as folder:
            harmed = make_sweep(Path(folder), trials, method)
            killed = harm(harmed, options.workers, options.kills, options.seed)
            answer = judge(harmed)
            serial = make_sweep(Path(folder) / "serial", trials, method)
            work(serial)
            unharmed = judge(serial)
        same = answer["best"] == unharmed["best"]
        failed = failed or bool(answer["wrong"]) or bool(unharmed["wrong"]) or not same
        print(json.dumps({"method": method, "kills": killed, **answer, "best_unharmed": unharmed["best"]}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
