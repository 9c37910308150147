"""`trainer rm RUN...`: delete runs with everything in their directories."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from trainer.cli.common import agrees
from trainer.cli.options import RUN_HELP, add_output_options, make_parser
from trainer.core.errors import DONE, USER_MUST_CHANGE, UserError
from trainer.core.files import read_json
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.lock import launching
from trainer.runs.registry import find, reference_to, runs_dir_from
from trainer.runs.state import state_of

_DESCRIPTION = (
    "Delete runs with everything in their directories: checkpoints, logs, metrics, exports. Runs that are active must "
    "be stopped first. Asks for confirmation unless --yes is given."
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*-[a-z2-7]{8}")


def main(argv: list[str]) -> int:
    """Run `trainer rm` and return the exit code."""
    parser = make_parser("rm", _DESCRIPTION, "trainer rm k3v9 --yes", allow_abbrev=True)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--yes", "-y", action="store_true", help="delete without asking")
    add_output_options(parser)
    options = parser.parse_args(argv)
    runs_dir = runs_dir_from(options.runs_dir)
    runs = list({run.path: run for run in (find(name, runs_dir) for name in options.runs)}.values())
    for run in runs:
        _require_run(run)
    _require_ended(runs)
    if not options.yes and not _confirmed([run.path.name for run in runs]):
        return USER_MUST_CHANGE
    with ExitStack() as stack:
        for run in runs:
            with suppress(OSError):  # a full disk, which this is to empty
                stack.enter_context(launching(run))
        _require_ended(runs)  # it may have been resumed since the question was asked
        for run in runs:
            # Rename first, so that a deletion that is interrupted leaves no partial run.
            doomed = run.path.with_name(f".deleting-{run.path.name}")
            os.rename(run.path, doomed)
            shutil.rmtree(doomed)
    names = [run.path.name for run in runs]
    print(json.dumps({"deleted": names}) if options.json else f"deleted {', '.join(names)}")
    return DONE


def _require_ended(runs: list[RunDirectory]) -> None:
    """Check that no run is alive.

    Raises:
        UserError: One is.
    """
    jobs = states_of(runs)
    for run in runs:
        state = state_of(run, jobs)
        if state.is_active:
            raise UserError(f"{run.path.name} is {state.name}", f"stop it first: trainer stop {reference_to(run)}")


def _require_run(run: RunDirectory) -> None:
    """Check that a folder is a run: a `config.yaml` alone is in many folders.

    Raises:
        UserError: It is not.
    """
    is_named = _NAME.fullmatch(run.path.name) is not None
    if run.path.is_symlink() or not is_named or not is_manifest(run.manifest_path):
        raise UserError(
            f"{run.path} is not deleted: a run is a folder NAME-ID with a manifest.json, and not a symbolic link",
            "look at what is in it, then delete it with rm -r",
        )


def is_manifest(path: Path) -> bool:
    """Return whether the file is the manifest of a run."""
    try:
        return not path.is_symlink() and isinstance(read_json(path, {}).get("schema_version"), int)
    except (UserError, OSError, AttributeError):
        return False


def _confirmed(names: list[str]) -> bool:
    if not sys.stdin.isatty():
        raise UserError("cannot ask for confirmation without a terminal", "add --yes to delete without asking")
    return agrees(f"delete {', '.join(names)}?")
