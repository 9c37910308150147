"""`trainer resume [RUN] [key=value ...]`: resume a run from its newest good checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trainer.cli.common import how_to_watch, launched
from trainer.cli.options import add_output_options, add_run, add_trust, add_watching_options, make_parser
from trainer.config.cluster import Slurm
from trainer.config.instantiate import freeze, read_whole
from trainer.core.errors import DONE, UserError
from trainer.core.files import write_atomic
from trainer.core.near import did_you_mean
from trainer.launch import launchers
from trainer.launch.jobs import states_of
from trainer.runs import trust
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Resumed
from trainer.runs.lock import launching
from trainer.runs.registry import reference_to, runs_dir_from
from trainer.runs.state import state_of
from trainer.tracking.client_settings import record_environment

CHANGEABLE = {
    "trainer": ("max_steps", "max_epochs", "max_time", "expandable_segments"),
    "resources": (
        "nodes",
        "gpus",
        "gpus_per_node",
        "cpu_processes",
        "min_nodes",
        "spare_nodes",
        "numa_binding",
        "devices",
    ),
    "checkpoint": (
        "every_n_steps",
        "every_minutes",
        "keep_last",
        "keep_best",
        "keep_every_n_steps",
        "save_best",
        "save_best_every_minutes",
        "on_failure",
        "snapshot",
        "buffer_mb",
    ),
    "resilience": (
        "max_restarts",
        "agree_every_s",
        "stop_deadline_s",
        "collective_timeout_s",
        "hang_factor",
        "hang_after_s",
        "hang_slow_s",
        "straggler_factor",
        "straggler_after_s",
        "on_oom",
        "on_nonfinite",
        "on_spike",
        "spike_z",
    ),
    "data": ("micro_batch", "num_workers"),
    "security": ("allow",),
    "cluster": tuple(option.name for option in fields(Slurm) if option.name != "name"),
}
"""Keys that `trainer resume` may change, by section: they do not affect the result of a step that goes well.
docs/reliability.md has the same list.
"""
_DESCRIPTION = (
    "Resume a run from its newest good checkpoint, with the configuration and the code snapshot that it was launched "
    "with. Overrides may change its length, resources, and options of checkpoints, reliability and the cluster."
)


def main(argv: list[str]) -> int:
    """Run `trainer resume` and return the exit code."""
    parser = make_parser("resume", _DESCRIPTION, "trainer resume k3v9 trainer.max_steps=2000")
    add_run(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"changes in the sections {', '.join(CHANGEABLE)}"
    )
    add_trust(parser)
    add_watching_options(parser)
    add_output_options(parser)
    options = parser.parse_intermixed_args(argv)
    if options.run and "=" in options.run:
        options.overrides.insert(0, options.run)
        options.run = None
    run = trust.find_trusted(options.run, runs_dir_from(options.runs_dir), options.trust)
    with launching(run):
        _launch(run, options)
    if options.json:
        print(json.dumps({"id": run.id, "path": str(run.path), "attempt": run.launch().attempt}))
    is_local = run.config()["cluster"]["name"] == "local"
    if options.detach or not (is_local or options.follow):
        if not options.json:
            print(f"{launched(run)}; {how_to_watch(run)}")
        return DONE
    from trainer.launch.follow import follow

    return follow(run, detached_ok=not is_local)


def _launch(run: RunDirectory, options: argparse.Namespace) -> None:
    """Launch the run, unless it is alive or has nothing left to do."""
    state = state_of(run, states_of([run]))
    if state.is_active:
        raise UserError(f"{run.path.name} is already {state.name}", how_to_watch(run))
    changed = changed_config(run, options.overrides)
    if state.name == "finished" and not any(one.startswith("trainer.max_") for one in options.overrides):
        raise UserError(
            f"{run.path.name} has finished",
            f"to train further, raise its limit: trainer resume {reference_to(run)} trainer.max_steps=...",
        )
    _launch_changed(run, changed, options)


def changed_config(run: RunDirectory, overrides: list[str]) -> dict[str, Any]:
    """Return the frozen configuration with `overrides` applied, checked.

    Raises:
        UserError: For an override that a resumed run cannot change, or a configuration that is invalid.
    """
    from trainer.checks.config import check

    config = with_overrides(read_whole(run.config_path), overrides)
    launched_from = Path(run.launch().cwd or ".")
    check(config, launched_from if launched_from.is_dir() else None, fits=False)
    return config


def with_overrides(
    config: dict[str, Any], overrides: list[str], *, more: Sequence[str] = (), what: str = "a resumed run"
) -> dict[str, Any]:
    """Apply the overrides to a frozen configuration, and check the types of its closed sections.

    Args:
        config: The configuration, which is changed.
        overrides: `key=value` with keys of `CHANGEABLE` or `more`.
        more: Further keys that may be changed, `section.key` each.
        what: Words for the run, in messages.

    Raises:
        UserError: For another key, or a value of a wrong type.
    """
    from trainer.config.override_value import value_of
    from trainer.config.problems import raise_all
    from trainer.config.typed import is_closed, problems_of, to_config

    allowed = [f"{section}.{key}" for section, keys in CHANGEABLE.items() for key in keys] + list(more)
    places = []
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or key not in allowed:
            section, _, name = key.partition(".")
            is_typo = name not in (config.get(section) or {})
            hint = did_you_mean(key, allowed) if is_typo else ""
            fix = hint or f"{_changeable(section, allowed, what)}; "
            raise UserError(f"{override}: {what} cannot change this", f"{fix}for all else use trainer fit")
        section, name = key.split(".")
        places.append((section, name))
        config.setdefault(section, {})[name] = value_of(override)
        if section == "trainer" and config[section][name] == -1:
            config[section][name] = None  # no limit, as in Lightning
        if section == "resources" and name in ("gpus", "cpu_processes", "nodes"):
            config["resources"]["gpus_per_node"] = None
    raise_all(
        [problem for section in config if is_closed(section) for problem in problems_of(section, config[section])]
    )
    typed = to_config(config)
    for section, name in places:
        if is_closed(section):
            config[section][name] = getattr(getattr(typed, section), name)
    return config


def _changeable(section: str, allowed: list[str], what: str) -> str:
    """Return which keys of a section may be changed, or of which sections."""
    of_section = [key for key in allowed if key.startswith(f"{section}.")]
    sections = dict.fromkeys(key.partition(".")[0] for key in allowed)
    return f"{what} can change {', '.join(of_section) or 'keys of ' + ', '.join(sections)}"


def _launch_changed(run: RunDirectory, config: dict[str, Any], options: argparse.Namespace) -> None:
    from trainer.config.shape import resolve

    cluster, overrides = config["cluster"]["name"], options.overrides
    run.unseal()
    if overrides:
        shape = resolve(config)
        launchers.check(config, shape)
        write_atomic(run.config_path, freeze(config))
        run.write_launch(replace(run.launch(), shape=shape))
    if options.trust != run.launch().trusted:
        run.write_launch(replace(run.launch(), trusted=options.trust))
    record_environment(run, config["tracking"])
    run.add_event(Resumed(overrides=overrides))
    launchers.launcher(cluster, detached=options.detach, keep_script=not overrides).launch(run)
