"""`trainer sync [RUN...]`: upload offline runs to Weights & Biases."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.cli.options import RUN_HELP, add_output_options, add_trust, make_parser
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, INTERRUPTED
from trainer.core.text import one_line
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs, runs_dir_from
from trainer.runs.state import state_of
from trainer.runs.trust import find_trusted, trusted_among
from trainer.tracking.live_upload import LiveUpload
from trainer.tracking.upload import accepted, upload

_DESCRIPTION = (
    "Upload what runs logged offline to Weights & Biases, artifacts included, several runs at once, and ask the server "
    "what it has accepted. Segments that were uploaded before are skipped. Runs that are still active are skipped, or "
    "with --live uploaded while they run, until they end. The exit code is 3 if a segment could not be uploaded, or if "
    "the server has fewer rows than the run."
)
_AT_ONCE = 4
_POLL_S = 2.0


def main(argv: list[str]) -> int:
    """Run `trainer sync` and return the exit code."""
    parser = make_parser("sync", _DESCRIPTION, "trainer sync k3v9", "trainer sync --live")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUN_HELP} (default: all runs)")
    parser.add_argument("--live", action="store_true", help="also upload active runs, until they have ended")
    add_trust(parser)
    add_output_options(parser)
    options = parser.parse_args(argv)
    runs_dir = runs_dir_from(options.runs_dir)
    runs = [find_trusted(name, runs_dir, options.trust) for name in options.runs]
    if not options.runs:
        runs = all_runs(runs_dir) if options.trust else trusted_among(all_runs(runs_dir))
    code = DONE
    if options.live and not _follow(runs, quiet=options.json):
        code = INTERRUPTED
    jobs = states_of(runs)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        rows = []
        for run, (row, result) in zip(runs, pool.map(lambda run: _result(run, jobs), runs), strict=True):
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
    is_short = any(row["served"] is not None and row["served"] < row["rows"] for row in rows)
    return ENVIRONMENT_MUST_CHANGE if is_short or any(row["failed"] for row in rows) else code


def _follow(runs: Sequence[RunDirectory], quiet: bool) -> bool:
    """Upload the active runs while they log, until they have ended. Returns whether Ctrl-C did not end it before."""
    jobs = states_of(list(runs))
    following = [LiveUpload(run) for run in runs if state_of(run, jobs).is_active]
    if not quiet:
        for one in following:
            print(f"{one.run.path.name}: uploading while it runs (Ctrl-C ends the upload, not the run)", flush=True)
    waiting = list(following)
    try:
        while waiting:
            jobs = states_of([one.run for one in waiting])
            waiting = [one for one in waiting if not one.poll(state_of(one.run, jobs).is_active)]
            time.sleep(_POLL_S if waiting else 0)
    except KeyboardInterrupt:
        return False
    finally:
        for one in following:
            one.end()
    return True


def _result(run: RunDirectory, jobs: Any) -> tuple[dict[str, Any], str]:
    """Upload the segments of a run unless it is active; return the row for --json and a sentence."""
    state = state_of(run, jobs)
    row: dict[str, Any] = {"id": run.id, "uploaded": 0, "already": 0, "failed": [], "rows": None, "served": None}
    if state.is_active:
        # wandb marks a file as synced when it has uploaded it, so a file that still grows must wait.
        return {**row, "skipped": state.name}, f"{state.name}; sync it after it has ended, or with --live"
    done = upload(run)
    failed = [str(path) for path in done.failed]
    if failed:
        print(f"{done.output}\n", file=sys.stderr)
    row |= {"uploaded": done.uploaded, "already": done.already, "failed": failed}
    sentence = _sentence(done.uploaded, done.already, len(failed))
    if not done.uploaded or failed:
        return row, sentence
    answer = accepted(run)
    if answer is None:
        return row, f"{sentence}; the server did not say what it has accepted"
    row |= {"rows": answer.rows, "served": answer.served}
    if answer.served < answer.rows:
        return row, f"{sentence}, but the server has {answer.served} of {answer.rows} rows: sync it again later"
    return row, f"{sentence}, {answer.rows} rows accepted: {one_line(answer.url)}"


def _sentence(uploaded: int, already: int, failed: int) -> str:
    if uploaded + already + failed == 0:
        return "nothing was logged offline"
    parts = [
        f"{count} {word}"
        for count, word in ((uploaded, "uploaded"), (already, "uploaded before"), (failed, "failed"))
        if count
    ]
    return ", ".join(parts)
