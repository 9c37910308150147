"""`trainer logs [RUN]`: the log of a rank; `-f` follows it through restarts until the run ends."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from trainer.cli.common import parser_of
from trainer.core.errors import UserError
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import find, reference_to, runs_dir_from
from trainer.runs.state import state_of

_POLL_S = 0.3
_STATE_EVERY_S = 2.0
"""How often -f asks whether the run still lives; on SLURM that is a call."""


def main(argv: list[str]) -> int:
    parser = parser_of("logs", "The log of a run, of its newest attempt.", "trainer logs -f k3v9")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends, through restarts")
    parser.add_argument("--rank", type=int, metavar="R", help="another rank than 0")
    parser.add_argument("--node", type=int, metavar="N", help="the log of node N: torchrun's own words")
    parser.add_argument("--attempt", type=int, metavar="N", help="another attempt than the newest")
    parser.add_argument("--all", action="store_true", help="every attempt, oldest first")
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    name = f"node-{options.node}.log" if options.node is not None else f"rank-{options.rank or 0}.log"
    if options.json:
        print(json.dumps({str(path): path.read_text(errors="replace") for path in _chosen(run, name, options)}))
    elif options.follow:
        _follow(run, name, options)
    else:
        for path in _chosen(run, name, options):
            if options.all:
                print(f"==> {path.parent.name} <==")
            sys.stdout.write(path.read_text(errors="replace"))
    return 0


def _logs(run: RunDirectory, name: str) -> list[Path]:
    """The files of this name, by attempt."""
    return sorted(run.logs_dir.glob(f"attempt-*/{name}"), key=lambda path: int(path.parent.name.partition("-")[2]))


def _chosen(run: RunDirectory, name: str, options: argparse.Namespace) -> list[Path]:
    found = _logs(run, name)
    if options.attempt is not None:
        found = [path for path in found if path.parent.name == f"attempt-{options.attempt:02d}"]
    if not found:
        there = sorted({path.name for path in run.logs_dir.glob("attempt-*/*.log")})
        raise UserError(
            f"{run.path.name} has no {name} yet",
            f"there is: {', '.join(there) or 'nothing'}; trainer show {reference_to(run)}",
        )
    return found if options.all else found[-1:]


def _follow(run: RunDirectory, name: str, options: argparse.Namespace) -> None:
    """Print what is there and what comes, until the run has ended and everything is printed."""
    done: dict[Path, int] = {}
    if not options.all:
        done = {path: path.stat().st_size for path in _logs(run, name)[:-1]}
    asked, active = 0.0, True
    while True:
        if time.monotonic() - asked >= _STATE_EVERY_S:
            asked, active = time.monotonic(), state_of(run, states_of([run])).is_active
        printed = _print_new(run, name, done)
        if not active and not printed:
            return
        time.sleep(_POLL_S)


def _print_new(run: RunDirectory, name: str, done: dict[Path, int]) -> bool:
    """Print what the files have grown by; a file that is new after the first is announced."""
    printed = False
    for path in _logs(run, name):
        if path not in done and done:
            print(f"==> {path.parent.name} <==")
        with path.open("rb") as file:
            file.seek(done.get(path, 0))
            new = file.read()
        done[path] = done.get(path, 0) + len(new)
        if new:
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()
            printed = True
    return printed
