"""A task of a job array: `python -m trainer.cli.sweep_task begin SWEEP_DIR | end SWEEP_DIR RUN_DIR CODE`.

`begin` claims a trial, makes or resumes its run and prints the path of the run; nothing if there is none for this task.
`end` records the result.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from trainer.cli.sweep_trial import begin as begin_run
from trainer.cli.sweep_trial import home
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, EnvironmentFault, TrainerError
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Queued
from trainer.runs.records import Launch
from trainer.slurm import render, resources
from trainer.slurm.commands import SlurmRefused, patiently
from trainer.slurm.commands import run as call
from trainer.slurm.submit import script_path
from trainer.sweeps import arrays
from trainer.sweeps.advance import Claim, acquire, fail
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import settle, views
from trainer.sweeps.records import ADAPTIVE


def begin(sweep: SweepDirectory) -> RunDirectory | None:
    """Return the run that this task trains; None if there is nothing for it to do."""
    job = os.environ["SLURM_JOB_ID"]
    spec = sweep.spec()
    home(spec)
    mine = _mine(sweep, job)
    if mine is not None:  # this task was requeued
        return mine
    states = patiently(lambda: _states(sweep))
    only = None
    if spec.method not in ADAPTIVE:
        only = int(os.environ["TRAINER_SWEEP_FIRST"]) + int(os.environ["SLURM_ARRAY_TASK_ID"])
    while True:
        claim = acquire(sweep, slurm_states=states, only=only, job=job)
        if not isinstance(claim, Claim):
            print(f"nothing to do: {claim or 'no trial is left for this task'}", file=sys.stderr)
            return None
        try:
            run = begin_run(sweep, claim)
        except TrainerError as error:
            print(f"trial {claim.trial.number}: {error}", file=sys.stderr)
            fail(sweep, claim, error)
            if only is not None:
                return None
            continue
        _adopt(sweep, run, job, claim.trial.number)
        if spec.prune is not None:
            from trainer.cli.sweep_watch import start

            start(sweep, claim.trial.number, run)
        return run


def _states(sweep: SweepDirectory) -> dict[str, str]:
    states = arrays.states_of(sweep)
    if states is None:
        raise EnvironmentFault("squeue does not respond", "wait")
    return states


def _mine(sweep: SweepDirectory, job: str) -> RunDirectory | None:
    """Return the run of the trial that this job has claimed already and that has no result."""
    for view in views(sweep, None):
        if view.owner is not None and view.owner.slurm_job_id == job and view.run is not None:
            ready = view.run.exists() and view.run.launch_path.exists() and view.names.runs[-1] == view.owner.number
            return view.run if ready else None
    return None


def _adopt(sweep: SweepDirectory, run: RunDirectory, job: str, number: int) -> None:
    """Make this task the job of the run: in its launch, in the queue, and by the log of the job."""
    before = run.launch()
    launch = Launch(cluster="slurm", shape=before.shape, cwd=before.cwd, attempt=run.next_attempt(), slurm_job_id=job)
    run.write_launch(replace(launch, trusted=before.trusted))
    run.stop_request.unlink(missing_ok=True)
    run.add_event(Queued(slurm_job_id=job))
    with suppress(OSError):  # another file system: then only the sweep has the log
        os.link(sweep.logs_dir / f"slurm-{job}.log", run.logs_dir / f"slurm-{job}.log")
    config, cwd = run.config(), Path(launch.cwd or ".")
    shape = run.shape()
    # For a resume by hand, and for a cluster that does not requeue.
    text = render.script(config, shape, run.path, cwd, resources.cpus_per_process(config, shape))
    write_atomic(script_path(run), text)
    with suppress(SlurmRefused, TrainerError):
        call("scontrol", "update", f"JobId={job}", f"JobName={run.path.name}")
    print(f"trial {number} is {run.path.name}", file=sys.stderr, flush=True)


def end(sweep: SweepDirectory, run: RunDirectory, code: int) -> int:
    """Record the result of the trial of this task, and return the exit code of the script."""
    spec = sweep.spec()
    settle(sweep, spec, views(sweep, None))
    with suppress(SlurmRefused, TrainerError):  # trials whose job was lost, at the next end otherwise
        arrays.advance(sweep, spec, submit="lost")
    print(f"{run.path.name} ended with {code}", file=sys.stderr, flush=True)
    return DONE


def main(arguments: list[str]) -> int:
    """Run `begin` or `end`, and return the exit code."""
    sweep = SweepDirectory(Path(arguments[1]))
    if arguments[0] == "begin":
        run = begin(sweep)
        print(run.path if run is not None else "")
        return DONE
    return end(sweep, RunDirectory(Path(arguments[2])), int(arguments[3]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code or ENVIRONMENT_MUST_CHANGE)
