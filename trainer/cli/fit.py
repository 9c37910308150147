"""`trainer fit`: compose, check, launch, follow."""

from __future__ import annotations

import argparse
import sys

from trainer.cli.overrides import compose_all, parser
from trainer.config.compose import printed
from trainer.core.errors import DONE, UserError
from trainer.starter.folder import expand

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
    _require_following(arguments)
    if arguments.cfg:
        for one in composed:
            sys.stdout.write(printed(one, arguments.cfg, arguments.package, arguments.resolve))
        return DONE
    from trainer.cli.job import check_all  # not for --cfg
    from trainer.cli.launching import launch, plan, sweep

    jobs = check_all(composed)
    if arguments.dry_run:
        for job in jobs:
            print(plan(job))
        return DONE
    if not arguments.multirun:
        return launch(jobs[0], arguments)[0]
    return sweep(jobs, arguments)


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
    _require_following(arguments)
    return arguments


def _require_following(arguments: argparse.Namespace) -> None:
    if arguments.multirun and arguments.detach:
        raise UserError("--detach with --multirun: the jobs run one after the other", "leave one of the two out")
