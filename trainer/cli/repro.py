"""`trainer repro RUN [key=value ...]`: reproduce a run from its frozen code, configuration and seeds."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.cli.common import how_to_watch, launched
from trainer.cli.options import RUN_HELP, add_output_options, add_trust, add_watching_options, make_parser
from trainer.cli.resume import with_overrides
from trainer.config.instantiate import read_whole
from trainer.core.errors import DONE, UserError
from trainer.core.text import one_line
from trainer.launch import launchers
from trainer.runs import trust
from trainer.runs.curves import first_difference
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Resumed
from trainer.runs.facts import mapping
from trainer.runs.manifest import environment
from trainer.runs.packages import requirements
from trainer.runs.registry import reference_to, runs_dir_from
from trainer.runs.reproduction import Loss, create, losses, working_directory
from trainer.tracking.client_settings import record_environment

_DESCRIPTION = (
    "Reproduce a run: start its code snapshot with uncommitted changes, its configuration and its seeds, under a new "
    "id. What could not be restored is printed line by line: packages, GPUs, data that differ here. Overrides may "
    "change limits and resources as in trainer resume, paths of the data, and cluster=NAME."
)
_MOST_LINES = 30


def main(argv: list[str]) -> int:
    """Run `trainer repro` and return the exit code: that of the new run, if it is followed."""
    options = _parse(argv)
    run = trust.find_trusted(options.run, runs_dir_from(options.runs_dir), options.trust)
    if options.requirements:
        lines = requirements(mapping(run.manifest()))
        if not lines:
            raise UserError(f"{run.path.name} did not record its packages", "an older version of trainer made it")
        print("\n".join(map(one_line, lines)))
        return DONE
    cwd = working_directory(run)
    config = _config(run, options.overrides, cwd)
    lost = [*losses(run, config, environment(), cwd), *_changes(run, options.overrides)]
    if not options.json:
        print("\n".join(_report(run, config, lost)), flush=True)
    if options.dry_run:
        if options.json:
            print(json.dumps(_answer(run, None, lost), indent=1))
        return DONE
    return _launch(run, config, lost, options)


def _parse(argv: list[str]) -> argparse.Namespace:
    examples = ("trainer repro k3v9", "trainer repro k3v9 --dry-run", "trainer repro /shared/runs/a-k3v9 cluster=slurm")
    parser = make_parser("repro", _DESCRIPTION, *examples)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes for this machine or cluster")
    parser.add_argument("--dry-run", action="store_true", help="print what could not be restored, and exit")
    parser.add_argument(
        "--requirements", action="store_true", help="print the packages of the run as a requirements.txt, and exit"
    )
    add_trust(parser)
    add_watching_options(parser)
    add_output_options(parser)
    options: argparse.Namespace = parser.parse_intermixed_args(argv)
    return options


def _config(run: RunDirectory, overrides: list[str], cwd: Path) -> dict[str, Any]:
    """Return the frozen configuration with the overrides applied, checked but for its targets.

    Raises:
        UserError: For an override that is not allowed, or a shape that this machine or cluster cannot have.
    """
    from trainer.checks.config import check
    from trainer.config.shape import resolve

    config = read_whole(run.config_path)
    groups = [one for one in overrides if one.startswith("cluster=")]
    if groups:
        from trainer.config.compose import compose

        config["cluster"] = compose(groups, config_dirs=[]).config["cluster"]
    recorded = mapping(run.manifest()).get("data")
    files = [f"data.{key}" for key, value in config["data"].items() if isinstance(value, str) and key != "_target_"]
    files = [key for key in files if not isinstance(recorded, dict) or key in recorded]
    values = [one for one in overrides if one not in groups]
    config = with_overrides(config, values, more=files, what="a reproduction")
    if groups:
        launchers.prepare(config)
    check(config, cwd, targets=False)
    launchers.check(config, resolve(config))
    return config


def _changes(run: RunDirectory, overrides: list[str]) -> list[Loss]:
    """Return what a resume of the first run, and this command, changed."""
    changed = [one for event in run.events_of(Resumed) for one in event.overrides]
    return [
        *(Loss(one.partition("=")[0], f"changed by a resume: {one}") for one in changed),
        *(Loss(one.partition("=")[0], f"changed by this command: {one}") for one in overrides),
    ]


def _report(run: RunDirectory, config: dict[str, Any], lost: list[Loss]) -> list[str]:
    code = mapping(mapping(run.manifest()).get("code"))
    commit = str(code.get("commit") or "")[:12]
    dirty = " with uncommitted changes" if code.get("dirty") else ""
    at = f" at commit {commit}{dirty}" if commit else ""
    lines = [
        f"restored from {one_line(run.path.name)}: code{one_line(at)}, configuration, seed {config.get('seed')}, "
        f"PYTHONHASHSEED {one_line(run.hash_seed())}"
    ]
    if not lost:
        return [*lines, "nothing differs of what the run recorded"]
    width = min(max(len(one.topic) for one in lost), 30)
    lines.append("not restored, or different here:")
    lines += [f"  {one_line(one.topic):<{width}}  {one_line(one.text)}" for one in lost[:_MOST_LINES]]
    return lines + ([f"  and {len(lost) - _MOST_LINES} more; --json lists all"] if len(lost) > _MOST_LINES else [])


def _answer(run: RunDirectory, new: RunDirectory | None, lost: list[Loss]) -> dict[str, Any]:
    made = {"id": new.id, "path": str(new.path)} if new else {"id": None, "path": None}
    return {**made, "reproduces": str(run.path), "not_restored": [asdict(one) for one in lost]}


def _launch(run: RunDirectory, config: dict[str, Any], lost: list[Loss], options: argparse.Namespace) -> int:
    from trainer.config.shape import resolve
    from trainer.launch.follow import follow

    cwd, cluster = working_directory(run), config["cluster"]["name"]
    runs_dir = runs_dir_from(options.runs_dir)
    new = create(run, config, runs_dir=runs_dir, overrides=options.overrides, cwd=cwd)
    trusted = trust.why_untrusted(new) is not None  # as in cli/launching.py: it was made just now
    new.write_launch(replace(new.launch(), cwd=str(cwd), shape=resolve(config), trusted=trusted))
    record_environment(new, config["tracking"])
    if options.json:
        print(json.dumps(_answer(run, new, lost), indent=1), flush=True)
    else:
        print(f"run {new.path.name} reproduces {one_line(run.path.name)}", flush=True)
    launchers.launcher(cluster, detached=options.detach).launch(new)
    if options.detach or (cluster != "local" and not options.follow):
        if not options.json:
            print(f"{launched(new)}; {how_to_watch(new)}")
        return DONE
    code = follow(new, detached_ok=cluster != "local", stream=sys.stderr if options.json else None)
    if not options.json:
        print("\n".join(_outcome(run, new)))
    return code


def _outcome(run: RunDirectory, new: RunDirectory) -> list[str]:
    """Return whether the metrics are those of the first run."""
    found = first_difference(run.metrics_path, new.metrics_path)
    if "step" in found:
        text = f"differ from step {found['step']}: {one_line(', '.join(found['metrics'][:3]))}"
    else:
        text = f"equal at {found['steps']} steps" if found["steps"] else "no step in common"
    return [f"metrics and those of {one_line(run.path.name)}: {text}", f"more: {_compare(run, new)}"]


def _compare(run: RunDirectory, new: RunDirectory) -> str:
    return f"trainer compare {reference_to(run)} {reference_to(new)}"
