"""`trainer rm RUN...`: delete runs with all that is in their directories."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys

from trainer.core.errors import USER_MUST_CHANGE, UserError
from trainer.launch.jobs import states_of
from trainer.runs.registry import find, reference_to, runs_dir_from
from trainer.runs.state import state_of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trainer rm", description="Delete runs, checkpoints and all.", epilog="example: trainer rm k3v9 --yes"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="id, prefix, name, path or SLURM job")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    parser.add_argument("--runs-dir", metavar="DIR", help="where the runs are: TRAINER_RUNS_DIR, else ./runs")
    parser.add_argument("--json", action="store_true", help="for programs; asks nothing, so it needs --yes")
    options = parser.parse_args(argv)
    runs_dir = runs_dir_from(options.runs_dir)
    runs = list({run.path: run for run in (find(name, runs_dir) for name in options.runs)}.values())
    jobs = states_of(runs)
    for run in runs:
        state = state_of(run, jobs)
        if state.is_active:
            raise UserError(f"{run.path.name} is {state.name}", f"stop it first: trainer stop {reference_to(run)}")
    if not options.yes and not _confirmed([run.path.name for run in runs]):
        return USER_MUST_CHANGE
    for run in runs:
        # Renamed first: a run that is half deleted is none, whatever happens meanwhile.
        doomed = run.path.with_name(f".deleting-{run.path.name}")
        os.rename(run.path, doomed)
        shutil.rmtree(doomed)
    names = [run.path.name for run in runs]
    print(json.dumps({"deleted": names}) if options.json else f"deleted {', '.join(names)}")
    return 0


def _confirmed(names: list[str]) -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on", "add --yes to delete without asking")
    return input(f"delete {', '.join(names)}? [y/N] ").strip().lower() in ("y", "yes")
