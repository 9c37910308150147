"""Launching and following the checked jobs of `trainer fit`: one job, or those of a sweep in turn."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.cli.common import how_to_watch, launched
from trainer.cli.job import Job, describe
from trainer.core.errors import DONE
from trainer.core.text import one_line
from trainer.launch import launchers
from trainer.launch.follow import follow, is_under_agent
from trainer.runs import trust
from trainer.runs.credentials import is_of_a_tool
from trainer.runs.directory import RunDirectory
from trainer.runs.records import PlannedRun
from trainer.supervise.ahead import NodeAhead
from trainer.tracking.client_settings import record_environment


def plan(job: Job) -> str:
    """Return the plan of a job with its job script or command, as text."""
    lines = [f"{word:<11}{text}" for word, text in describe(job)]
    script = launchers.preview(job.config, job.shape)
    if script is not None:
        return "\n".join([*lines, "", script])
    command = f"{Path(sys.executable).name} -m trainer.supervise.node {job.config['runs_dir']}/{job.config['name']}-ID"
    return "\n".join([*lines, f"{'command':<11}{command}", ""])


def launch(
    job: Job,
    arguments: argparse.Namespace,
    after: RunDirectory | None = None,
    planned: PlannedRun | None = None,
    ahead: NodeAhead | None = None,
) -> tuple[int, RunDirectory]:
    """Create the run, launch it and, unless detached, follow it.

    Args:
        job: The checked job.
        arguments: The options of `trainer fit`.
        after: On SLURM, start only after this run has ended (`afterany`).
        planned: The plan of the job, which the run keeps.
        ahead: The result of `launchers.start_ahead`.

    Returns:
        The exit code, and the run.
    """
    run = RunDirectory.create(
        job.config,
        overrides=job.composed.overrides,
        choices={group: option for group, option in job.composed.choices.items() if option is not None},
        code_root=Path.cwd(),
        hydra=job.hydra,
    )
    if planned is not None:
        run.write_plan(planned)
    record_environment(run, job.config["tracking"])
    report_snapshot(run.manifest()["code"])
    if trust.why_untrusted(run) is not None:  # a file system without owners or modes; nobody had the time to write
        run.write_launch(replace(run.launch(), trusted=True))
    facts = dict(describe(job))
    validated = f"; validated {facts['validation']}" if job.config["trainer"]["val_check_interval"] else ""
    print(f"run {run.path.name}: {facts['shape']}; {facts['batch']}; until {facts['until']}{validated}", flush=True)
    cluster = job.config["cluster"]["name"]
    launchers.launcher(cluster, detached=arguments.detach, after=after, ahead=ahead).launch(run)
    # The end of the command is the end of the trial for `wandb agent`.
    if arguments.detach or (cluster != "local" and not arguments.follow and not is_under_agent()):
        if "cost" in facts:
            print(f"it may use {facts['cost']}")
        print(f"{launched(run)}; {how_to_watch(run)}")
        return DONE, run
    return follow(run, detached_ok=cluster != "local"), run


def report_snapshot(code: dict[str, Any]) -> None:
    """Print what is not in the code snapshot of a run, as its manifest lists it."""
    reports = {
        "left_out": "linked, not copied, into the run's code snapshot because of their size or number: {}",
        "withheld": "left out of the run's code snapshot, because they may hold credentials: {}\n"
        "  the run does not see them: give it secrets by environment variables, or by files outside the project",
        "hidden": "dotfiles are not part of the run's code snapshot: {}\n  rename those that the run needs",
        "keys": "WARNING: keys or tokens are in the text of {}\n"
        "  the run's code snapshot links to them; move the secrets out, and replace those that were committed",
    }
    for key, report in reports.items():
        names = [one_line(name) for name in code[key] if key != "hidden" or not is_of_a_tool(name)]
        if names:
            print(report.format(", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")))
