"""`trainer diff A B`: `trainer compare` for two runs."""

from __future__ import annotations

from trainer.cli.compare import add_options, show
from trainer.cli.options import RUN_HELP, make_parser

_DESCRIPTION = (
    "Show what differs between two runs: configuration, code (as a unified diff), packages, hardware, data and "
    "results. What is equal is left out. trainer compare takes more than two."
)


def main(argv: list[str]) -> int:
    """Run `trainer diff` and return the exit code."""
    parser = make_parser("diff", _DESCRIPTION, "trainer diff k3v9 p7ab", "trainer diff k3v9 p7ab --files")
    parser.add_argument("runs", nargs=2, metavar="RUN", help=f"two runs, each by {RUN_HELP}")
    add_options(parser)
    return show(parser.parse_args(argv))
