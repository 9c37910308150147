"""`trainer fit`: compose, check, launch, follow."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from trainer.cli.common import how_to_watch, launched
from trainer.cli.job import Job, check_all, compose_all, describe, parser
from trainer.cluster import launchers
from trainer.config.compose import printed
from trainer.errors import DONE, INTERRUPTED, UserError
from trainer.planner.write import expand
from trainer.runs.files import read_live

_DESCRIPTION = """Train: compose the job, check it, launch it and follow it until it ends.
Ctrl-C saves a checkpoint and stops; `trainer resume` goes on."""


def main(argv: list[str]) -> int:
    """Returns 0 when all jobs finished, else the first other code."""
    arguments = _parse(argv)
    look_only = bool(arguments.cfg or arguments.dry_run)
    arguments.overrides = expand(
        arguments.overrides, arguments.config_dir, keep=not look_only, say=sys.stderr if arguments.cfg else sys.stdout
    )
    composed = compose_all(arguments)
    if arguments.cfg:
        for one in composed:
            sys.stdout.write(printed(one, arguments.cfg, arguments.package, arguments.resolve))
        return DONE
    jobs = check_all(composed)
    if arguments.dry_run:
        for job in jobs:
            print(_plan(job))
        return DONE
    if not arguments.multirun:
        return _launch(jobs[0], arguments)[0]
    return _sweep(jobs, arguments)


def _parse(argv: list[str]) -> argparse.Namespace:
    made = parser("fit", _DESCRIPTION)
    made.add_argument("--cfg", "-c", choices=["job", "hydra", "all"], help="print the configuration and do nothing")
    made.add_argument("--package", "-p", metavar="KEY", help="with --cfg: only this part of it")
    made.add_argument("--resolve", action="store_true", help="with --cfg: with interpolations replaced")
    made.add_argument("--dry-run", action="store_true", help="check, print the plan and the job script, write nothing")
    watching = made.add_mutually_exclusive_group()
    watching.add_argument(
        "--follow", action="store_true", help="show the progress until the end (on this machine: always)"
    )
    watching.add_argument("--detach", action="store_true", help="return once it is launched")
    arguments = made.parse_intermixed_args(argv)
    if not arguments.cfg and (arguments.package or arguments.resolve):
        option = "--package" if arguments.package else "--resolve"
        raise UserError(f"{option} is about what --cfg prints", f"add --cfg job, or leave {option} out")
    if arguments.multirun and arguments.detach:
        raise UserError("--detach with --multirun: the jobs run one after the other", "leave one of the two out")
    return arguments


def _plan(job: Job) -> str:
    lines = [f"{word:<11}{text}" for word, text in describe(job)]
    script = launchers.preview(job.config, job.shape)
    if script is not None:
        return "\n".join([*lines, "", script])
    command = f"{Path(sys.executable).name} -m trainer.cluster.node {job.config['runs_dir']}/{job.config['name']}-ID"
    return "\n".join([*lines, f"{'command':<11}{command}", ""])


def _launch(job: Job, arguments: argparse.Namespace, after: Any = None) -> tuple[int, Any]:
    """Make the run, start it (on SLURM not before the run `after` has ended) and, unless detached, follow it; the exit
    code and the RunDirectory."""
    from trainer.cluster.follow import follow
    from trainer.runs.directory import RunDirectory

    run = RunDirectory.create(
        job.config,
        overrides=job.composed.overrides,
        choices={group: option for group, option in job.composed.choices.items() if option is not None},
        code_root=Path.cwd(),
    )
    facts = dict(describe(job))
    print(f"run {run.path.name}: {facts['shape']}; {facts['batch']}; until {facts['until']}", flush=True)
    cluster = job.config["cluster"]["name"]
    launchers.launcher(cluster, detached=arguments.detach, after=after).launch(run)
    if arguments.detach or (cluster != "local" and not arguments.follow):
        if "cost" in facts:
            print(f"it may use {facts['cost']}")
        print(f"{launched(run)}; {how_to_watch(run)}")
        return DONE, run
    return follow(run, detached_ok=cluster != "local"), run


def _sweep(jobs: list[Job], arguments: argparse.Namespace) -> int:
    """One job after the other; Ctrl-C ends the sweep with the job that it stops."""
    rows: list[tuple[str, int, Any]] = []
    code = DONE
    varied = _varied(jobs)
    for number, job in enumerate(jobs, start=1):
        what = " ".join(one for one in job.composed.overrides if one in varied)
        print(f"\njob {number} of {len(jobs)}: {what}", flush=True)
        at_once = job.config["cluster"].get("sweep_at_once")
        outcome, run = _launch(job, arguments, rows[-at_once][2] if at_once and len(rows) >= at_once else None)
        code = code or outcome
        rows.append((what, outcome, run))
        if outcome == INTERRUPTED:
            break
    print(f"\n{len(rows)} of {len(jobs)} jobs")
    width = max(len(overrides) for overrides, _, _ in rows)
    for overrides, outcome, run in rows:
        state = f"exit code {outcome}" if outcome else _state(run)
        print(f"  {overrides:<{width}}  {state:<22}{_best(run):<28}{run.path.name}")
    return code


def _varied(jobs: list[Job]) -> set[str]:
    """The overrides that not all jobs of a sweep have."""
    counts = Counter(override for job in jobs for override in job.composed.overrides)
    return {override for override, count in counts.items() if count < len(jobs) or len(jobs) == 1}


def _state(run: Any) -> str:
    """`finished`, or as which job it was submitted."""
    return "finished" if any(one["outcome"] == "finished" for one in run.attempts()) else launched(run)


def _best(run: Any) -> str:
    """The best metric that the last heartbeat of the first rank has."""
    best = read_live(run.live_dir / "rank-0.json").get("best")
    return f"{best['metric']} {best['value']:.4g}" if best else ""
