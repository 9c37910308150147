"""The options that `fit` and `check` share, and the configurations that a command line composes to.

Separate from the modules that check and launch jobs (`trainer.cli.job`, `trainer.cli.launching`), which `--cfg` does
not import.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trainer.cli.options import Parser, make_parser
from trainer.config.compose import Composed, Loaded, compose, points
from trainer.config.hydra_node import is_multirun
from trainer.core.errors import TrainerError, UserError

_NOTES = (
    "Configs are searched in --config-dir, then ./conf, then the configs that ship with trainer; `trainer fit --cfg "
    "job` prints the result. Config groups: experiment, model, data, task, optimizer, scheduler, strategy, cluster, "
    "checkpoint, tracking, logger, callbacks, notify, debug."
)


def overrides_parser(verb: str, description: str, *examples: str, more: str = "", sweeps: bool = True) -> Parser:
    """Return a parser with overrides and Hydra's own flags, with their meaning in Hydra.

    Args:
        verb: The verb.
        description: Its description.
        examples: Commands.
        more: A paragraph after the options.
        sweeps: Whether it takes several jobs. Without, `-m` is parsed, for the verb to refuse, and not listed.
    """
    parser = make_parser(verb, description, *examples, notes=f"{more}\n\n{_NOTES}" if more else _NOTES)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Hydra overrides, such as model=resnet18 optimizer.lr=0.1; data=FOLDER chooses an experiment that fits "
        "the files in FOLDER",
    )
    parser.add_argument(
        "--config-dir",
        "-cd",
        "--config-path",
        "-cp",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="config directory to search before ./conf; may be repeated",
    )
    parser.add_argument(
        "--config-name", "-cn", default="config", metavar="NAME", help="primary config (default: config)"
    )
    parser.add_argument(
        "--multirun",
        "-m",
        action="store_true",
        help="sweep: one job for each combination of key=a,b values" if sweeps else argparse.SUPPRESS,
    )
    return parser


def compose_all(arguments: argparse.Namespace, every_point: bool = True) -> list[Composed]:
    """Compose the job, or each job of a sweep, and print the notes of composing to stderr.

    Sets `arguments.multirun` for a sweep, including one that a config file requests (`hydra.mode=MULTIRUN`). Without
    `every_point` the result of a sweep is empty: `cli/sweep_launch.py` composes its points one by one.

    Raises:
        UserError: If a configuration cannot be composed.
    """
    where: dict[str, Any] = {"config_dirs": arguments.config_dir, "config_name": arguments.config_name}
    try:
        composed = [] if arguments.multirun else [compose(arguments.overrides, **where)]
    except UserError as error:
        # Several values for one key are valid if a config file requests a sweep.
        if not any("," in override or "(" in override for override in arguments.overrides):
            raise
        try:
            sweep = points(arguments.overrides, multirun=False, **where)
        except TrainerError:
            raise error from None
        if sweep is None:
            raise
        composed = []
    if composed and not is_multirun(composed[0].tree):
        return _print_notes(composed)
    arguments.multirun = True
    if not every_point:
        return []
    composed = []
    sweep, loaded = points(arguments.overrides, **where) or [], Loaded()
    for number, overrides in enumerate(sweep):
        first = composed[0] if composed else None
        try:
            composed.append(compose(overrides, number=number, after=first, loaded=loaded, **where))
        except TrainerError as error:
            raise name_point(error, overrides, len(sweep)) from None
    return _print_notes(composed)


def _print_notes(composed: list[Composed]) -> list[Composed]:
    """Print each distinct note of composing once, and return the argument."""
    for note in dict.fromkeys(note for one in composed for note in one.notes):
        print(f"note: {note}", file=sys.stderr)
    return composed


def name_point(error: TrainerError, overrides: list[str], num_points: int) -> TrainerError:
    """Add the overrides of the job to the error if the job is one of a sweep."""
    if num_points > 1:
        error.message = f"the job {' '.join(overrides)} of this sweep: {error.message}"
    return error
