"""The verbs on sweeps: status, stop, resume, retry, extend, best, export, ls, rm."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from trainer.cli.common import agrees, table
from trainer.cli.options import Parser, make_parser
from trainer.cli.sweep_follow import advance, follow
from trainer.cli.sweep_table import as_csv, as_json, headline, row_json, sweep_row, text
from trainer.core.errors import DONE, JOB_FAILED, TrainerError, UserError
from trainer.core.text import one_line, printable
from trainer.runs import trust
from trainer.runs.registry import runs_dir_from
from trainer.sweeps.advance import revised
from trainer.sweeps.analysis import table_of
from trainer.sweeps.directory import SweepDirectory, all_sweeps, find, reference_to, request_stop, sweeps_dir_of
from trainer.sweeps.outcome import open_run
from trainer.sweeps.progress import SWEEP_STOP, TrialView, settle, views
from trainer.sweeps.records import Retry, Spec

_STATES = ("failed", "stopped", "pruned", "finished")
_WAIT_S = 180.0


def _parser(verb: str, description: str, *examples: str, sweep: bool = True) -> Parser:
    parser = make_parser(f"sweep {verb}", description, *examples)
    if sweep:
        parser.add_argument(
            "sweep", nargs="?", metavar="SWEEP", help="id or its prefix, name or path (default: latest)"
        )
    parser.add_argument("--runs-dir", metavar="DIR", help="directory of the runs; the sweeps are in `sweeps` beside it")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def _find(options: argparse.Namespace) -> SweepDirectory:
    """Return the sweep of a command line, if only the user can have written it: its code is executed.

    Without a name, the latest that may be executed; others are skipped with a line.

    Raises:
        UserError: There is none, or somebody else may have written it.
    """
    folder = sweeps_dir_of(runs_dir_from(options.runs_dir))
    sweep = find(options.sweep, folder)
    if options.sweep:
        trust.require_folder(sweep.path)
        return sweep
    for sweep in reversed(all_sweeps(folder)):
        try:
            trust.require_folder(sweep.path)
        except UserError as error:
            print(f"trainer: skipped: {error.message}", file=sys.stderr)
            continue
        return sweep
    raise UserError(f"no sweep in {one_line(str(folder))} is yours alone", "name one to see why")


def status(argv: list[str]) -> int:
    """Print the trials of a sweep."""
    parser = _parser("status", "Show the trials of a sweep. Restarts trials that were killed.", "trainer sweep status")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument("--all", action="store_true", help="print every trial")
    parser.add_argument("--follow", action="store_true", help="print each trial as it ends")
    options = parser.parse_args(argv)
    sweep = _find(options)
    spec, found = advance(sweep)
    rows = table_of(sweep, spec, found, live=True)
    if options.csv:
        sys.stdout.write(as_csv(rows))
    elif options.json:
        print(json.dumps(as_json(sweep, spec, found, rows), indent=1))
    else:
        print(text(sweep, spec, found, rows, everything=options.all))
    return follow(sweep, sys.stderr if options.json or options.csv else sys.stdout) if options.follow else DONE


def stop(argv: list[str]) -> int:
    """Stop a sweep: no trial starts, and those that run save a checkpoint and end."""
    parser = _parser(
        "stop",
        "Let no further trial start, and stop those that run after they have saved a checkpoint.",
        "trainer sweep stop k3v9",
    )
    parser.add_argument("--keep-running", action="store_true", help="let the trials that run end by themselves")
    parser.add_argument("--wait", type=float, default=_WAIT_S, metavar="SECONDS", help="seconds to wait (default: 180)")
    options = parser.parse_args(argv)
    sweep = _find(options)
    request_stop(sweep, SWEEP_STOP)
    spec, found = _look(sweep)
    if not options.keep_running:
        if spec.cluster == "slurm":
            from trainer.sweeps import arrays

            arrays.cancel_waiting(sweep)
        deadline = time.monotonic() + options.wait
        while True:
            living = [view for view in found if view.is_alive]
            for view in living:
                _stop_run(view)
            if not living or time.monotonic() > deadline:
                break
            time.sleep(1)
            spec, found = _look(sweep)
    return _report(
        sweep,
        spec,
        found,
        options,
        code=JOB_FAILED if any(view.is_alive for view in found) and not options.keep_running else DONE,
    )


def _look(sweep: SweepDirectory) -> tuple[Spec, list[TrialView]]:
    spec = sweep.spec()
    if spec.cluster == "slurm":
        from trainer.sweeps import arrays

        return spec, arrays.advance(sweep, spec, submit="nothing")
    return spec, settle(sweep, spec, views(sweep, None))


def _stop_run(view: TrialView) -> None:
    from trainer.launch.launchers import signal_stop

    run = view.run
    if run is not None and run.launch_path.exists() and not run.stop_request.exists():
        run.request_stop("trainer sweep stop")
        signal_stop(run)


def _report(
    sweep: SweepDirectory, spec: Spec, found: list[TrialView], options: argparse.Namespace, code: int = DONE
) -> int:
    if options.json:
        print(json.dumps(as_json(sweep, spec, found, table_of(sweep, spec, found)), indent=1))
    else:
        print("\n".join(headline(sweep, spec, found)))
    return code


def resume(argv: list[str]) -> int:
    """Continue a sweep that was stopped, or whose processes or jobs are gone."""
    parser = _parser(
        "resume",
        "Continue a sweep that was stopped, or whose processes or jobs are gone.",
        "trainer sweep resume k3v9",
        "trainer sweep resume k3v9 sweep.max_gpu_hours=50",
    )
    parser.add_argument("changes", nargs="*", metavar="sweep.KEY=VALUE", help="new limits: " + ", ".join(_CHANGEABLE))
    parser.add_argument("--follow", action="store_true", help="print each trial as it ends")
    options = parser.parse_intermixed_args(argv)
    if options.sweep and "=" in options.sweep:
        options.changes.insert(0, options.sweep)
        options.sweep = None
    sweep = _find(options)
    if options.changes:
        _change(sweep, options.changes)
    sweep.stop_request.unlink(missing_ok=True)
    spec, found = advance(sweep, submit=True)
    code = _report(sweep, spec, found, options)
    return follow(sweep, sys.stderr if options.json else sys.stdout) if options.follow else code


_CHANGEABLE = (
    "at_once",
    "max_failure_rate",
    "max_gpu_hours",
    "max_cost",
    "until",
    "prune",
    "prune_after",
    "prune_factor",
)


def _change(sweep: SweepDirectory, overrides: list[str]) -> None:
    """Write a revision of the spec with other limits.

    Raises:
        UserError: Another key, or an invalid value.
    """
    from trainer.config.compose import swept
    from trainer.sweeps.options import deadline, read_options
    from trainer.sweeps.space import space_of

    wrong = [one for one in overrides if one.partition("=")[0] not in [f"sweep.{key}" for key in _CHANGEABLE]]
    if wrong:
        raise UserError(
            f"{wrong[0]}: a sweep cannot change this", f"it can change sweep.{', sweep.'.join(_CHANGEABLE)}"
        )
    found = swept(overrides, config_dirs=[])
    assert found is not None
    control = space_of(found[0], 0).control
    read = read_options(found[1], control)
    changes: dict[str, Any] = {key: getattr(read, key) for key in control}
    if "until" in changes:
        changes["until"] = deadline(changes["until"])
    _revise(sweep, **changes)


def _revise(sweep: SweepDirectory, **changes: Any) -> Spec:
    spec = revised(sweep.spec(), **changes)
    if not sweep.write_spec(spec):
        raise UserError(
            "another command has changed this sweep just now", "see trainer sweep status, then repeat yours"
        )
    return spec


def retry(argv: list[str]) -> int:
    """Try trials again."""
    parser = _parser(
        "retry",
        "Try trials again: failed ones from the start, stopped and pruned ones from their checkpoint.",
        "trainer sweep retry k3v9 --state failed",
    )
    parser.add_argument("--state", choices=_STATES, help="try all trials in this state again")
    parser.add_argument(
        "--trial", type=int, action="append", default=[], metavar="N", help="try this trial again; may be repeated"
    )
    options = parser.parse_args(argv)
    if not options.state and not options.trial:
        raise UserError("which trials?", "trainer sweep retry --state failed, or --trial N")
    sweep = _find(options)
    _, found = _look(sweep)
    unknown = [number for number in options.trial if number not in {view.number for view in found}]
    if unknown:
        raise UserError(f"there is no trial {unknown[0]}", f"trials: 0 to {len(found) - 1}")
    for view in found:
        if view.number in options.trial and view.result is None:
            fix = (
                f"only a trial that has ended can be tried again; trainer sweep status {reference_to(sweep)} shows them"
            )
            raise UserError(f"trial {view.number} is {view.state}", fix)
    chosen = [
        view
        for view in found
        if view.result is not None and (view.number in options.trial or view.result.state == options.state)
    ]
    for view in chosen:
        assert view.result is not None
        fresh = view.result.state in ("failed", "finished")
        record = Retry(first_owner=view.names.owners, fresh=fresh, time=time.time())
        sweep.add_retry(view.number, view.names.retries + 1, record)
    spec, found = advance(sweep, submit=True)
    if not options.json:
        print("1 trial is tried again" if len(chosen) == 1 else f"{len(chosen)} trials are tried again")
    return _report(sweep, spec, found, options)


def extend(argv: list[str]) -> int:
    """Add trials to a sweep."""
    from trainer.cli.sweep_extend import extend as extended

    parser = _parser(
        "extend",
        "Add trials, or the points of other values; those that exist stay as they are.",
        "trainer sweep extend k3v9 --trials 20",
        "trainer sweep extend k3v9 optimizer.lr=0.1,0.01,0.001",
    )
    parser.add_argument("--trials", type=int, metavar="N", help="number of trials to add")
    parser.add_argument("changes", nargs="*", metavar="key=a,b", help="new values of a parameter")
    options = parser.parse_intermixed_args(argv)
    if options.sweep and "=" in options.sweep:
        options.changes.insert(0, options.sweep)
        options.sweep = None
    if (options.trials is None) == (not options.changes):
        raise UserError("nothing to add", "trainer sweep extend --trials N, or key=a,b")
    sweep = _find(options)
    number = extended(sweep, options.trials, options.changes)
    spec, found = advance(sweep, submit=True)
    if not options.json:
        print("1 trial was added" if number == 1 else f"{number} trials were added")
    return _report(sweep, spec, found, options)


def best(argv: list[str]) -> int:
    """Print the best trial, or the command line that trains it."""
    parser = _parser(
        "best",
        "Show the best trial; with several metrics, the Pareto front.",
        "trainer sweep best --overrides",
    )
    parser.add_argument("--overrides", action="store_true", help="print the overrides that train it, for trainer fit")
    options = parser.parse_args(argv)
    sweep = _find(options)
    spec, found = _look(sweep)
    rows = table_of(sweep, spec, found)
    ranked = rows.ranked()
    if not ranked:
        raise UserError(
            f"no trial of {sweep.path.name} has a value yet",
            f"trainer sweep status {reference_to(sweep)} shows its trials",
        )
    ranked = ranked if len(rows.directions) > 1 else ranked[:1]
    if options.overrides:
        for row in ranked:
            print(shlex.join(sweep.trial(row.number).overrides))
    elif options.json:
        answer = [{**row_json(row), "overrides": sweep.trial(row.number).overrides} for row in ranked]
        print(json.dumps(answer if len(rows.directions) > 1 else answer[0], indent=1))
    else:
        for row in ranked:
            values = ", ".join(f"{name} {value:.6g}" for name, value in zip(rows.metrics, row.values, strict=False))
            print(f"trial {row.number}: {values} at step {row.step}; run {row.run_name}")
            print(f"  trainer fit {shlex.join(sweep.trial(row.number).overrides)}")
    return DONE


def export(argv: list[str]) -> int:
    """Write an Optuna storage with the trials of the sweep."""
    from trainer.sweeps.storage import write_storage

    parser = _parser(
        "export",
        "Write the trials as a storage of Optuna. It is a copy: write it again after changes.",
        "trainer sweep export k3v9 --output sweep.db",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="SQLite file (default: optuna.db in the sweep)")
    options = parser.parse_args(argv)
    sweep = _find(options)
    spec, found = _look(sweep)
    path = options.output or sweep.path / "optuna.db"
    write_storage(sweep, spec, found, path)
    if options.json:
        print(json.dumps({"id": sweep.id, "path": str(path)}))
    else:
        print(f"{path}; to open it: optuna-dashboard sqlite:///{path}")
    return DONE


def ls(argv: list[str]) -> int:
    """List the sweeps."""
    options = _parser("ls", "List the sweeps.", "trainer sweep ls", sweep=False).parse_args(argv)
    rows: list[list[str]] = []
    answers: list[dict[str, Any]] = []
    for sweep in all_sweeps(sweeps_dir_of(runs_dir_from(options.runs_dir))):
        try:
            spec = sweep.spec()
            found = views(sweep, None)
            row = sweep_row(sweep, spec, found)
        except Exception as error:  # whatever it is, the other sweeps are listed
            reason = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
            print(f"trainer: skipped {one_line(sweep.path.name)}: {printable(reason)}", file=sys.stderr)
            continue
        rows.append(row)
        done = sum(view.result is not None for view in found)
        answers.append(
            {
                "id": sweep.id,
                "name": sweep.path.name,
                "path": str(sweep.path),
                "method": spec.method,
                "trials": spec.trials,
                "ended": done,
            }
        )
    if options.json:
        print(json.dumps(answers, indent=1))
    elif rows:
        print(table(rows, ["ID", "NAME", "METHOD", "ENDED", "AGE", "TRIALS"]))
    else:
        print("there are no sweeps; start one: trainer sweep optimizer.lr=0.01,0.001")
    return DONE


def rm(argv: list[str]) -> int:
    """Delete sweeps."""
    parser = _parser("rm", "Delete a sweep. Its runs stay, without --runs.", "trainer sweep rm k3v9 --runs")
    parser.add_argument("--runs", action="store_true", help="also delete the runs of its trials")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    options = parser.parse_args(argv)
    if not options.sweep:
        raise UserError("which sweep?", "trainer sweep rm SWEEP; trainer sweep ls lists them")
    sweep = _find(options)
    spec, found = _look(sweep)
    if any(view.is_alive for view in found):
        raise UserError(
            f"{sweep.path.name} has trials that run", f"stop it first: trainer sweep stop {reference_to(sweep)}"
        )
    runs = _runs_of(sweep, Path(spec.runs_dir)) if options.runs else []
    what = f"{sweep.path.name}" + (f" and {len(runs)} runs" if options.runs else "")
    if not options.yes and not _confirmed(what):
        return JOB_FAILED
    for path in runs:
        shutil.rmtree(path)
    shutil.rmtree(sweep.path)
    print(json.dumps({"id": sweep.id, "runs": len(runs)}) if options.json else f"deleted {what}")
    return DONE


def _runs_of(sweep: SweepDirectory, runs_dir: Path) -> list[Path]:
    """Return the runs that the sweep has made: folders directly in its runs directory whose manifest names it."""
    found: dict[Path, None] = {}
    for number, names in sweep.names().items():
        for index in names.runs:
            record = sweep.run_of(number, index)
            run = open_run(record.path) if record else None
            if run is None or run.path.parent != runs_dir or run.path.is_symlink() or not run.path.is_dir():
                continue
            recorded = run.manifest().get("sweep")
            if isinstance(recorded, dict) and recorded.get("id") == sweep.id:
                found[run.path] = None
    return list(found)


def _confirmed(what: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"delete {what}?", "add --yes")
    return agrees(f"delete {what}?")
