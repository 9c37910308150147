"""`trainer sync [RUN...]`: upload to Weights & Biases what was logged offline."""

from __future__ import annotations

import argparse
import json
import sys

from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE
from trainer.launch.jobs import states_of
from trainer.runs.registry import all_runs, find, runs_dir_from
from trainer.runs.state import state_of
from trainer.tracking.upload import upload


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trainer sync",
        description="Upload to Weights & Biases what runs logged offline; what is there already is left out.",
        epilog="example: trainer sync k3v9",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id, prefix, name, path or SLURM job; all runs here")
    parser.add_argument("--runs-dir", metavar="DIR", help="where the runs are: TRAINER_RUNS_DIR, else ./runs")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    runs_dir = runs_dir_from(options.runs_dir)
    runs = [find(name, runs_dir) for name in options.runs] or all_runs(runs_dir)
    jobs = states_of(runs)
    rows = []
    for run in runs:
        state = state_of(run, jobs)
        if state.is_active:
            # Its file has no end yet, and is marked as uploaded once for all.
            rows.append({"id": run.id, "uploaded": 0, "already": 0, "failed": [], "skipped": state.name})
            said = f"{state.name}; sync it when it has ended"
        else:
            done = upload(run)
            failed = [str(path) for path in done.failed]
            rows.append({"id": run.id, "uploaded": done.uploaded, "already": done.already, "failed": failed})
            said = _sentence(done.uploaded, done.already, len(failed))
            if failed:
                print(f"{done.output}\n", file=sys.stderr)
        if not options.json:
            print(f"{run.path.name}: {said}")
    if options.json:
        print(json.dumps(rows, indent=1))
    if any(row["failed"] for row in rows):
        print(
            "trainer: not everything was uploaded; nothing is lost, the segments stay where they are\n"
            "  give a key (WANDB_API_KEY, or: wandb login) and a network that reaches the server, and sync again",
            file=sys.stderr,
        )
        return ENVIRONMENT_MUST_CHANGE
    return DONE


def _sentence(uploaded: int, already: int, failed: int) -> str:
    if uploaded + already + failed == 0:
        return "nothing was logged offline"
    parts = [
        f"{count} {word}"
        for count, word in ((uploaded, "uploaded"), (already, "uploaded before"), (failed, "failed"))
        if count
    ]
    return ", ".join(parts)
