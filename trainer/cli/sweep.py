"""`trainer sweep`: launch many runs from one command; show, stop, resume, extend and rank them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module

from trainer.cli.overrides import overrides_parser
from trainer.core.errors import DONE, USER_MUST_CHANGE, TrainerError, UserError
from trainer.core.near import did_you_mean
from trainer.starter.folder import expand

VERBS = {
    "status": "show the trials, and restart those that were killed",
    "stop": "save checkpoints and stop the trials; none starts afterwards",
    "resume": "continue a stopped sweep, or one whose jobs were lost",
    "retry": "try trials again: --state failed, or --trial N",
    "extend": "add trials (--trials N) or points of other values",
    "best": "show the best trial; --overrides prints the line that trains it",
    "export": "write a storage that Optuna and optuna-dashboard read",
    "ls": "list the sweeps",
    "rm": "delete a sweep, with --runs its runs, too",
}
_DESCRIPTION = (
    "Launch a sweep: each key=a,b is a parameter, each point a run of its own. Every point is checked before the first "
    "one starts; then the command returns, and the sweep continues without it."
)
_EXAMPLES = (
    "trainer sweep experiment=quickstart optimizer.lr=0.001,0.003 seed=1,2",
    "trainer sweep optimizer.lr='interval(0.001,0.1)' sweep.method=tpe",
    "trainer sweep status",
)


def main(argv: list[str]) -> int:
    """Run `trainer sweep` and return the exit code."""
    if argv and argv[0] in VERBS:
        module = import_module("trainer.cli.sweep_verbs")
        verb: Callable[[list[str]], int] = getattr(module, argv[0])
        return verb(argv[1:])
    if argv and "=" not in argv[0] and not argv[0].startswith("-"):
        fix = f"{did_you_mean(argv[0], VERBS)}verbs: {', '.join(VERBS)}; parameters are written as key=a,b"
        raise UserError(f"trainer sweep {argv[0]}: no such verb", fix)
    return launch(_parse(argv))


def _parse(argv: list[str]) -> argparse.Namespace:
    notes = "\n".join(["verbs:", *(f"  {name:<8} {text}" for name, text in VERBS.items())])
    parser = overrides_parser("sweep", _DESCRIPTION, *_EXAMPLES, more=notes)
    parser.usage = f"trainer sweep [options] [key=a,b ...]\n       trainer sweep {{{','.join(VERBS)}}} ..."
    parser.add_argument("--dry-run", action="store_true", help="check every point, print the plan, and exit")
    parser.add_argument("--follow", action="store_true", help="print each trial as it ends, until the sweep is over")
    parser.add_argument("--at-once", type=int, metavar="N", help="maximum number of concurrent trials (sweep.at_once)")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.add_argument("--anyway", action="store_true", help="start it even if its plan does not fit in GPU memory")
    parser.add_argument(
        "--yes", "-y", action="store_true", help="start without asking, also above cluster.confirm_above_gpu_hours"
    )
    arguments: argparse.Namespace = parser.parse_intermixed_args(argv)
    if arguments.at_once is not None:
        arguments.overrides.append(f"sweep.at_once={arguments.at_once}")
    arguments.multirun = True
    arguments.overrides = expand(
        arguments.overrides, arguments.config_dir, keep=not arguments.dry_run, stream=sys.stderr
    )
    return arguments


def launch(arguments: argparse.Namespace) -> int:
    """Check, create and start the sweep of a command line, and return the exit code."""
    from trainer.cli.launching import report_snapshot
    from trainer.cli.sweep_follow import advance, follow
    from trainer.cli.sweep_launch import confirmed, create, plan, prepare, with_plan
    from trainer.core.files import read_json
    from trainer.sweeps.directory import reference_to

    as_json = getattr(arguments, "json", False)
    prepared, hours = with_plan(prepare(arguments), arguments)
    lines = [*plan(prepared), *([f"up to {hours:.4g} GPU hours in all"] if hours else [])]
    if arguments.dry_run:
        print("\n".join([*lines, f"{prepared.num_checked} points checked; nothing was started"]))
        return DONE
    if not confirmed(prepared, hours, arguments):
        print("not started", file=sys.stderr)
        return USER_MUST_CHANGE
    sweep = create(prepared)
    if not as_json:
        report_snapshot(read_json(sweep.manifest_path, {})["code"])
        print("\n".join([*lines, f"{prepared.num_checked} points checked"]), flush=True)
    try:
        advance(sweep, submit=True)
    except TrainerError as error:
        error.fix += f"; the sweep is kept: trainer sweep resume {reference_to(sweep)} starts it"
        raise
    if as_json:
        print(json.dumps({"id": sweep.id, "name": sweep.path.name, "path": str(sweep.path)}), flush=True)
    else:
        name = reference_to(sweep)
        print(f"sweep {sweep.path.name} was started")
        print(
            f"  its trials: trainer sweep status {name}; to stop them: trainer sweep stop {name}",
            flush=True,
        )
    return follow(sweep, stream=sys.stderr if as_json else sys.stdout) if arguments.follow else DONE
