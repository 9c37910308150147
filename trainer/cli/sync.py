"""`trainer sync [RUN...]`: upload offline runs to Weights & Biases."""

from __future__ import annotations

import json
import sys
from typing import Any

from trainer.cli.options import RUN_HELP, add_output_options, add_trust, make_parser
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs, runs_dir_from
from trainer.runs.seal import changing
from trainer.runs.state import state_of
from trainer.runs.trust import find_trusted, trusted_among
from trainer.tracking.upload import upload

_DESCRIPTION = (
    "Upload what runs logged offline to Weights & Biases. Segments that were uploaded before are skipped, and so are "
    "runs that are still active. The exit code is 3 if a segment could not be uploaded."
)


def main(argv: list[str]) -> int:
    """Run `trainer sync` and return the exit code."""
    parser = make_parser("sync", _DESCRIPTION, "trainer sync k3v9")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUN_HELP} (default: all runs)")
    add_trust(parser)
    add_output_options(parser)
    options = parser.parse_args(argv)
    runs_dir = runs_dir_from(options.runs_dir)
    runs = [find_trusted(name, runs_dir, options.trust) for name in options.runs]
    if not options.runs:
        runs = all_runs(runs_dir) if options.trust else trusted_among(all_runs(runs_dir))
    jobs = states_of(runs)
    rows = []
    for run in runs:
        state = state_of(run, jobs)
        if state.is_active:
            # wandb marks a file as synced when it has uploaded it, so a file that still grows must wait.
            rows.append({"id": run.id, "uploaded": 0, "already": 0, "failed": [], "skipped": state.name})
            result = f"{state.name}; sync it after it has ended"
        else:
            row, result = _upload(run)
            rows.append(row)
        if not options.json:
            print(f"{run.path.name}: {result}")
    if options.json:
        print(json.dumps(rows, indent=1))
    if any(row["failed"] for row in rows):
        print(
            "trainer: some segments were not uploaded; nothing is lost, they stay in the run directories\n"
            "  set WANDB_API_KEY (or run: wandb login), check that the server can be reached, and sync again",
            file=sys.stderr,
        )
        return ENVIRONMENT_MUST_CHANGE
    return DONE


def _upload(run: RunDirectory) -> tuple[dict[str, Any], str]:
    """Upload the segments of a run, and return the row for --json and a sentence."""
    with changing(run):
        done = upload(run)
    failed = [str(path) for path in done.failed]
    if failed:
        print(f"{done.output}\n", file=sys.stderr)
    row = {"id": run.id, "uploaded": done.uploaded, "already": done.already, "failed": failed}
    return row, _sentence(done.uploaded, done.already, len(failed))


def _sentence(uploaded: int, already: int, failed: int) -> str:
    if uploaded + already + failed == 0:
        return "nothing was logged offline"
    parts = [
        f"{count} {word}"
        for count, word in ((uploaded, "uploaded"), (already, "uploaded before"), (failed, "failed"))
        if count
    ]
    return ", ".join(parts)
