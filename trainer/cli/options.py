"""The argument parser of every verb: layout of the help, messages of errors, options that several verbs share."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from trainer.core.errors import UserError
from trainer.core.near import did_you_mean

WIDTH = 80
"""Maximum number of columns of a help text."""
RUN_HELP = "run id or its prefix, name, path or SLURM job id"


class HelpFormatter(argparse.HelpFormatter):
    """Wraps the help at 80 columns and keeps the line breaks of paragraphs with indented lines (examples)."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(WIDTH, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, **{"max_help_position": 26, "width": width, **options})

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(part if "\n  " in part else "\n".join(self._split_lines(part, width)) for part in paragraphs)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError` that suggests the closest option."""

    given: Sequence[str] = ()
    """The arguments that were parsed last."""

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and keep the arguments for `error`."""
        self.given = tuple(args or ())
        return super().parse_intermixed_args(args, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse an option whose value is empty, as of a variable that is not set."""
        given = list(args or ())
        for before, text in pairwise(["", *given]):
            name, sign, value = text.partition("=")
            option = before if not text else name if sign and not value else ""
            action = self._option_string_actions.get(option)
            if action is not None and action.nargs != 0:
                raise UserError(f"{option}: its value is empty", "leave the option out for its default")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`, with the override to write if an option is LightningCLI's."""
        from trainer.cli.lightning_cli import rewritten  # only needed after a mistake

        line = rewritten(self.given)
        if line and "unrecognized arguments" in message:
            raise UserError(message, line)
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        options = [option for option in self._option_string_actions if option.startswith("--")]
        hint = did_you_mean(unknown, options) if unknown.startswith("-") else ""
        raise UserError(message, f"{hint}see {self.prog} --help")


def make_parser(verb: str, description: str, *examples: str, notes: str = "", allow_abbrev: bool = False) -> Parser:
    """Return the parser of a verb. `notes` is a paragraph of the help after the options, before the examples."""
    title = "example:" if len(examples) == 1 else "examples:"
    epilog = "\n".join([title, *(f"  {example}" for example in examples)])
    return Parser(
        prog=f"trainer {verb}",
        description=description,
        epilog=f"{notes}\n\n{epilog}" if notes else epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=allow_abbrev,
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the optional argument `RUN`."""
    parser.add_argument("run", nargs="?", metavar="RUN", help=f"{RUN_HELP} (default: the latest run)")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add `--trust`."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="execute a run that somebody else owns or may write to: its code and configuration run as you",
    )


def add_output_options(parser: argparse.ArgumentParser, output: argparse._ActionsContainer | None = None) -> None:
    """Add `--runs-dir` and `--json`.

    Args:
        parser: The parser of the verb.
        output: The group of options that exclude `--json`.
    """
    parser.add_argument(
        "--runs-dir", metavar="DIR", help="directory of the runs (default: $TRAINER_RUNS_DIR, else ./runs)"
    )
    (output or parser).add_argument("--json", action="store_true", help="print JSON, for scripts")


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Add `--checkpoint`."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="best|last|STEP",
        help="checkpoint with the best monitored metric, the newest one, or the one of an optimizer step "
        "(default: best)",
    )


def add_watching_options(parser: argparse.ArgumentParser) -> None:
    """Add `--follow` and `--detach`, which exclude each other."""
    watching = parser.add_mutually_exclusive_group()
    watching.add_argument(
        "--follow", action="store_true", help="follow the progress until the job ends (always, for cluster=local)"
    )
    watching.add_argument("--detach", action="store_true", help="return as soon as the job is launched")
