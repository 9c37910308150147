"""`trainer fit`: compose, check, launch, follow."""

from __future__ import annotations

import argparse
import sys

from trainer.cli.options import add_watching_options
from trainer.cli.overrides import compose_all, overrides_parser
from trainer.config.compose import Composed, printed
from trainer.core.errors import DONE, USER_MUST_CHANGE, UserError
from trainer.starter.folder import expand

_DESCRIPTION = (
    "Train a model: compose the configuration, check it and launch the job. A job on this machine is followed until it "
    "ends: Ctrl-C saves a checkpoint and stops it, and `trainer resume` resumes it."
)
_EXAMPLES = (
    "trainer fit experiment=quickstart trainer.max_epochs=2",
    "trainer fit experiment=quickstart -m optimizer.lr=0.001,0.003",
    "trainer fit experiment=quickstart --cfg job",
)


def main(argv: list[str]) -> int:
    """Run `trainer fit`; return 0 if the job finished, or the sweep was started."""
    arguments = _parse(argv)
    writes_nothing = bool(arguments.cfg or arguments.dry_run)
    stream = sys.stderr if arguments.cfg else sys.stdout
    arguments.overrides = expand(arguments.overrides, arguments.config_dir, keep=not writes_nothing, stream=stream)
    composed = compose_all(arguments, every_point=bool(arguments.cfg))
    if arguments.multirun and not arguments.cfg:
        from trainer.cli.sweep import launch as launch_sweep

        return launch_sweep(arguments)
    if arguments.cfg:
        for one in composed:
            sys.stdout.write(printed(one, arguments.cfg, arguments.package, arguments.resolve))
        return DONE
    if arguments.dry_run:
        _print_plans(composed)
        return DONE
    from trainer.launch.launchers import start_ahead

    with start_ahead(composed[0].config) as ahead:
        from trainer.cli.approval import approve, plan_of
        from trainer.cli.job import check_all
        from trainer.cli.launching import launch

        jobs = check_all(composed)
        plans = [plan_of(job) for job in jobs]
        if not approve(jobs, plans, arguments):
            print("not launched", file=sys.stderr)
            return USER_MUST_CHANGE
        return launch(jobs[0], arguments, planned=plans[0].record() if plans[0] else None, ahead=ahead)[0]


def _print_plans(composed: list[Composed]) -> None:
    from trainer.cli.approval import planned_lines
    from trainer.cli.job import check_all  # imported late: --cfg does not need it
    from trainer.cli.launching import plan

    for job in check_all(composed):
        print("\n".join([*planned_lines(job), plan(job)]))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = overrides_parser("fit", _DESCRIPTION, *_EXAMPLES)
    parser.add_argument(
        "--cfg", "-c", choices=["job", "hydra", "all"], help="print the composed configuration and exit"
    )
    parser.add_argument("--package", "-p", metavar="KEY", help="with --cfg: print only this part of the configuration")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: resolve interpolations")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the job, print its plan and its job script, and exit; writes nothing",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="launch the job even if its plan does not fit in GPU memory"
    )
    parser.add_argument(
        "--yes", "-y", action="store_true", help="launch without asking, also above cluster.confirm_above_gpu_hours"
    )
    add_watching_options(parser)
    arguments: argparse.Namespace = parser.parse_intermixed_args(argv)
    if not arguments.cfg and (arguments.package or arguments.resolve):
        option = "--package" if arguments.package else "--resolve"
        raise UserError(f"{option} changes what --cfg prints", f"add --cfg job, or leave {option} out")
    return arguments
