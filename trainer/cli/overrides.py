"""What `fit` and `check` share: Hydra's flags, and what a command line composes to.

Apart from what checks and launches jobs (`trainer.cli.job`, `trainer.cli.launching`), which `--cfg` does not import.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from trainer.config.compose import Composed, compose, points
from trainer.config.near import did_you_mean
from trainer.errors import TrainerError, UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one message with the near option."""

    def error(self, message: str) -> NoReturn:
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
    made.add_argument("--config-dir", "-cd", action="append", default=[], type=Path, metavar="DIR")
    made.add_argument("--config-name", "-cn", default="config", metavar="NAME")
    made.add_argument("--multirun", "-m", action="store_true", help="one job for each combination of key=a,b")
    return made


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


_EPILOG = """configuration is looked for in --config-dir, in ./conf, then in what ships with trainer;
`trainer fit --cfg job` shows the result. Groups: experiment model data task optimizer scheduler
strategy cluster checkpoint tracking logger callbacks debug."""


def compose_all(arguments: argparse.Namespace) -> list[Composed]:
    """Compose the job, or each job of a sweep. Raises UserError."""
    sweep = [arguments.overrides]
    if arguments.multirun:
        sweep = points(arguments.overrides, config_dirs=arguments.config_dir)
    composed = []
    for overrides in sweep:
        try:
            composed.append(compose(overrides, config_dirs=arguments.config_dir, config_name=arguments.config_name))
        except TrainerError as error:
            raise of_point(error, overrides, len(sweep)) from None
    return composed


def of_point(error: TrainerError, overrides: list[str], num_points: int) -> TrainerError:
    """The error of one job of a sweep, which says of which."""
    if num_points > 1:
        error.message = f"the job {' '.join(overrides)} of this sweep: {error.message}"
    return error
