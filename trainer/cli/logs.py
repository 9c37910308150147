"""`trainer logs [RUN]`: print the log of a rank; `-f` follows it through restarts until the run ends."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
import time
from pathlib import Path

from trainer.cli.options import Parser, add_output_options, add_run, make_parser
from trainer.core.errors import DONE, UserError
from trainer.core.files import open_regular, read_text
from trainer.core.text import log_text
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import find, reference_to, runs_dir_from
from trainer.runs.state import state_of

_POLL_S = 0.3
_CHUNK_BYTES = 1024**2
_MOST_BYTES = 256 * 1024**2
"""Largest log that --json holds."""
_STATE_EVERY_S = 2.0
"""Interval in which -f checks that the run is active; on SLURM each check is a call of squeue or sacct."""


def _parser() -> Parser:
    description = "Print the log of a rank, or of a node, from the newest attempt of a run."
    parser = make_parser("logs", description, "trainer logs -f k3v9", "trainer logs k3v9 --rank 3 --attempt 0")
    add_run(parser)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="print new output until the run ends, across restarts"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="print the log of rank N (default: 0)")
    parser.add_argument("--node", type=int, metavar="N", help="print the log of node N, with torchrun's messages")
    parser.add_argument("--attempt", type=int, metavar="N", help="print attempt N, from 0 (default: the newest)")
    parser.add_argument("--all", action="store_true", help="print every attempt, oldest first")
    add_output_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run `trainer logs` and return the exit code."""
    options = _parser().parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    name = (run.rank_log(0, options.rank or 0) if options.node is None else run.node_log(0, options.node)).name
    if options.json:
        print(json.dumps({str(path): _whole(path) for path in _chosen(run, name, options)}))
    elif options.follow:
        _follow(run, name, options)
    else:
        for path in _chosen(run, name, options):
            if options.all:
                print(f"==> {path.parent.name} <==")
            if _print_from(path, 0) is None:
                raise UserError(f"{path} cannot be read", "it is not a regular file, or may not be read")
    return DONE


def _whole(path: Path) -> str:
    try:
        return read_text(path, _MOST_BYTES, errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "print it without --json, or another") from None


def _print_from(path: Path, offset: int) -> int | None:
    """Print a log from an offset, as text that cannot change the terminal; return its end, None if it is unreadable."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    is_terminal = sys.stdout.isatty()
    try:
        with open_regular(path) as file:
            file.seek(offset)
            while data := file.read(_CHUNK_BYTES):
                text = decoder.decode(data)
                sys.stdout.write(log_text(text) if is_terminal else text)
                offset += len(data)
    except BrokenPipeError:  # of stdout
        raise
    except OSError:
        return None
    return offset


def _logs(run: RunDirectory, name: str) -> list[Path]:
    """Return the log files of this name, by attempt."""
    paths = [run.attempt_logs(attempt) / name for attempt in run.logged_attempts()]
    return [path for path in paths if os.path.exists(path)]


def _chosen(run: RunDirectory, name: str, options: argparse.Namespace) -> list[Path]:
    logs = _logs(run, name)
    if options.attempt is not None:
        logs = [path for path in logs if path.parent == run.attempt_logs(options.attempt)]
    if not logs:
        existing = sorted({path.name for one in run.logged_attempts() for path in run.attempt_logs(one).glob("*.log")})
        raise UserError(
            f"{run.path.name} has no {name} yet",
            f"existing logs: {', '.join(existing) or 'none'}; see trainer show {reference_to(run)}",
        )
    return logs if options.all else logs[-1:]


def _follow(run: RunDirectory, name: str, options: argparse.Namespace) -> None:
    """Print the existing and all new output until the run has ended and everything is printed."""
    offsets: dict[Path, int] = {}
    if not options.all:
        offsets = {path: os.path.getsize(path) for path in _logs(run, name)[:-1]}
    checked, active = 0.0, True
    while True:
        if time.monotonic() - checked >= _STATE_EVERY_S:
            checked, active = time.monotonic(), state_of(run, states_of([run])).is_active
        printed = _print_new(run, name, offsets)
        if not active and not printed:
            return
        time.sleep(_POLL_S)


def _print_new(run: RunDirectory, name: str, offsets: dict[Path, int]) -> bool:
    """Print the output after `offsets`, with a heading before each later attempt, and advance the offsets.

    Returns:
        Whether anything was printed.
    """
    printed = False
    for path in _logs(run, name):
        if path not in offsets and offsets:
            print(f"==> {path.parent.name} <==")
        before = offsets.get(path, 0)
        offsets[path] = _print_from(path, before) or before
        if offsets[path] != before:
            sys.stdout.flush()
            printed = True
    return printed
