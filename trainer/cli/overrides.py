"""What `fit` and `check` share: Hydra's flags, and what a command line composes to.

Apart from what checks and launches jobs (`trainer.cli.job`, `trainer.cli.launching`), which `--cfg` does not import.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.config.compose import Composed, compose, points
from trainer.config.hydra_node import is_multirun
from trainer.core.errors import TrainerError, UserError
from trainer.core.near import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one message with the near option."""

    given: Sequence[str] = ()

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = tuple(args or ())
        return super().parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from trainer.cli.lightning_cli import rewritten  # a mistake may take its time

        line = rewritten(self.given)
        if line and "unrecognized arguments" in message:
            raise UserError(message, line)
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        options = [option for option in self._option_string_actions if option.startswith("--")]
        hint = did_you_mean(unknown, options) if unknown.startswith("-") else ""
        raise UserError(message, f"{hint}see {self.prog} --help")


def parser(verb: str, description: str) -> Parser:
    """Hydra's own flags, with Hydra's meaning."""
    made = Parser(
        prog=f"trainer {verb}", description=description, allow_abbrev=False, epilog=_EPILOG, formatter_class=_Formatter
    )
    made.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides: model=resnet18 optimizer.lr=0.1"
    )
    made.add_argument(
        "--config-dir", "-cd", "--config-path", "-cp", action="append", default=[], type=Path, metavar="DIR"
    )
    made.add_argument("--config-name", "-cn", default="config", metavar="NAME")
    made.add_argument("--multirun", "-m", action="store_true", help="one job for each combination of key=a,b")
    return made


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


_EPILOG = """configuration is looked for in --config-dir, in ./conf, then in what ships with trainer;
`trainer fit --cfg job` shows the result. Groups: experiment model data task optimizer scheduler
strategy cluster checkpoint tracking logger callbacks debug."""


def compose_all(arguments: argparse.Namespace) -> list[Composed]:
    """Compose the job, or each job of a sweep; then `arguments.multirun` is true, whoever asked for it.

    Raises UserError.
    """
    where = {"config_dirs": arguments.config_dir, "config_name": arguments.config_name}
    try:
        composed = [] if arguments.multirun else [compose(arguments.overrides, **where)]
    except UserError as error:
        # Several values for one job are meant for a sweep where a config file asks for one.
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
        return _noted(composed)
    arguments.multirun = True
    composed = []
    sweep = points(arguments.overrides, **where) or []
    for number, overrides in enumerate(sweep):
        first = composed[0] if composed else None
        try:
            composed.append(compose(overrides, number=number, after=first, **where))
        except TrainerError as error:
            raise of_point(error, overrides, len(sweep)) from None
    return _noted(composed)


def _noted(composed: list[Composed]) -> list[Composed]:
    """With the lines that composing has for the user, each once."""
    for note in dict.fromkeys(note for one in composed for note in one.notes):
        print(f"note: {note}", file=sys.stderr)
    return composed


def of_point(error: TrainerError, overrides: list[str], num_points: int) -> TrainerError:
    """The error of one job of a sweep, which says of which."""
    if num_points > 1:
        error.message = f"the job {' '.join(overrides)} of this sweep: {error.message}"
    return error
