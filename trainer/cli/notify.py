"""`trainer notify [RUN ...]`: send the notifications that are due, or a test message."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cli.options import RUN_HELP, add_output_options, add_trust, make_parser
from trainer.config.notify import channel_names, problems_of_notify, secrets_of
from trainer.config.problems import raise_all
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, EnvironmentFault, UserError
from trainer.core.text import printable
from trainer.launch.jobs import states_of, why_it_waits
from trainer.notify.deliver import deliver, options_of, report
from trainer.notify.message import Message, clean
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs, runs_dir_from
from trainer.runs.state import State, state_of
from trainer.runs.trust import find_trusted, trusted_among

_DESCRIPTION = (
    "Send the notifications that no process of a run can send: that its job is stuck in the queue, or that it died "
    "with its machine. Run it by cron, or with --watch in a terminal. --test sends a message to each channel of a run, "
    "or of the configuration composed here, and reports the channels that fail."
)


def main(argv: list[str]) -> int:
    """Run `trainer notify` and return the exit code: 3 if a channel did not take a message."""
    examples = ("trainer notify --test notify=slack", "trainer notify", "trainer notify --watch")
    parser = make_parser("notify", _DESCRIPTION, *examples)
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help=f"{RUN_HELP} (default: all runs); with --test also overrides"
    )
    parser.add_argument("--test", action="store_true", help="send a test message now")
    parser.add_argument("--watch", action="store_true", help="repeat until Ctrl-C")
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="pause of --watch (default: 60)")
    add_trust(parser)
    add_output_options(parser)
    options = parser.parse_args(argv)
    if options.test:
        return _test(options)
    while True:
        code = _pass(options)
        if not options.watch:
            return code
        time.sleep(max(1.0, options.every))


def _pass(options: argparse.Namespace) -> int:
    """Send what is due of each run."""
    runs_dir = runs_dir_from(options.runs_dir)
    runs = [find_trusted(name, runs_dir, options.trust) for name in options.runs]
    if not options.runs:
        runs = all_runs(runs_dir) if options.trust else trusted_among(all_runs(runs_dir))
    runs = [run for run in runs if options_of(run) is not None]
    states = states_of(runs)
    rows: list[dict[str, Any]] = []
    for run in runs:
        # Without an answer of SLURM, a job in its queue would look dead.
        is_known = states is not None or not run.launch().slurm_job_id
        state = state_of(run, states) if is_known else State("running")
        for message, failures in deliver(run, state, why_it_waits=lambda run=run: _reasons(run)):  # type: ignore[misc]
            rows.append({"id": run.id, "event": message.event, "title": message.title, "failed": failures})
            if not options.json:
                print(printable(report(message, failures, channel_names(options_of(run) or {}))), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1), flush=True)
    return ENVIRONMENT_MUST_CHANGE if any(row["failed"] for row in rows) else DONE


def _reasons(run: RunDirectory) -> list[str]:
    try:
        return why_it_waits(run)
    except EnvironmentFault as error:
        return [error.message]


def _test(options: argparse.Namespace) -> int:
    """Send a test message to the channels of a run, or of what is composed here."""
    run, section = _section(options)
    raise_all(list(problems_of_notify(section, os.environ)))
    if not channel_names(section):
        raise UserError("notify: there is no channel", "choose one, such as notify=slack, and try it again")
    path = str(run.path.absolute()) if run else str(Path.cwd())
    message = Message(
        event="test",
        title=f"{run.path.name if run else 'trainer'}: this is a test",
        run=run.path.name if run else "",
        id=run.id if run else "",
        state="",
        step=None,
        reason="Messages about runs will look like this.",
        next=f"trainer show {path}" if run else "",
        path=path,
        host=socket.gethostname(),
        wandb=None,
        time=time.time(),
    )
    from trainer.notify.channels import send

    failures = send(clean(message, secrets_of(section, os.environ)), section)
    names = channel_names(section)
    if options.json:
        print(json.dumps({"channels": names, "failed": failures}, indent=1))
    for name in [] if options.json else names:
        print(printable(f"{name}: {failures[name]}" if name in failures else f"{name}: sent"))
    sys.stdout.flush()
    if failures:
        sys.stdout.flush()
        os._exit(ENVIRONMENT_MUST_CHANGE)  # a thread may still wait for a name server
    return DONE


def _section(options: argparse.Namespace) -> tuple[RunDirectory | None, Mapping[str, Any]]:
    overrides = [text for text in options.runs if "=" in text]
    names = [text for text in options.runs if "=" not in text]
    if names:
        if len(names) > 1 or overrides:
            raise UserError("--test takes one run, or overrides", "trainer notify --test RUN, or --test notify=slack")
        run = find_trusted(names[0], runs_dir_from(options.runs_dir), options.trust)
        return run, run.config().get("notify") or {}
    from trainer.config.compose import compose

    return None, compose(["model=mlp", "data=digits", *overrides], config_dirs=[]).config["notify"]
