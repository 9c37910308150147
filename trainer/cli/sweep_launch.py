"""Launch a sweep: compose and check every point, freeze what the trials need, start them and return."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.common import agrees
from trainer.cli.job import Job, check_one, describe, freeze_shape
from trainer.cli.overrides import name_point
from trainer.config.compose import Composed, Loaded, compose, frozen_hydra, require_free_link, swept
from trainer.config.instantiate import freeze
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.files import require_utf8, write_atomic
from trainer.sweeps import decide
from trainer.sweeps.directory import SweepDirectory, sweeps_dir_of
from trainer.sweeps.options import SweepOptions, deadline, read_options
from trainer.sweeps.points import scaled
from trainer.sweeps.records import ADAPTIVE, Method, Spec, Trial
from trainer.sweeps.space import Space, overrides_of, size, space_of

if TYPE_CHECKING:
    from trainer.sweeps.custom import CustomSpace

_DEFAULT_TRIALS = 20


@dataclass(frozen=True)
class Prepared:
    """A sweep whose points were checked, and which exists nowhere yet."""

    spec: Spec
    trials: list[Trial]
    """The trials that are decided from the start: all but those of an adaptive search."""
    first: Job
    num_checked: int


def prepare(arguments: argparse.Namespace) -> Prepared:
    """Compose and check every point of the sweep on the command line.

    Raises:
        UserError: A point is invalid, or the space is.
        EnvironmentFault: This machine cannot launch it.
    """
    where: dict[str, Any] = {"config_dirs": arguments.config_dir, "config_name": arguments.config_name}
    found = swept(arguments.overrides, **where)
    assert found is not None
    overrides, tree = found
    seed = read_options(tree, space_of(overrides, 0).control).seed
    space = space_of(overrides, seed)
    options = read_options(tree, space.control)
    if not space.parameters and options.custom_search_space is None:
        raise UserError("the sweep has no parameter", "give one several values: optimizer.lr=0.1,0.01")
    method, count = _search(space, options)
    draft = _spec(arguments, space, options, method, count)
    custom = _custom(draft, where)
    trials = [] if method in ADAPTIVE else decide.planned(draft, 0, count, custom)
    checked = [one.overrides for one in trials] or _corners(space, custom)
    first, widest, notes = _check_points(checked, where)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if method in ADAPTIVE:
        from trainer.sweeps.adaptive import load

        load()
    spec = _completed(draft, first, widest)
    return Prepared(spec, trials, first, len(checked))


def _search(space: Space, options: SweepOptions) -> tuple[Method, int]:
    """Return the method and the number of trials.

    Raises:
        UserError: The method cannot search this space.
    """
    points = size(space.parameters)
    if options.custom_search_space is not None:
        points = None
    method = options.method or ("grid" if points is not None and options.trials is None else "sobol")
    if method == "grid" and options.custom_search_space is not None:
        raise UserError("custom_search_space: what a function adds has no grid", "write sweep.method=sobol")
    if method == "grid":
        if points is None:
            key = next(one.key for one in space.parameters if not one.choices)
            raise UserError(f"{key}: an interval has no grid", "write values, or sweep.method=sobol")
        return method, points if options.trials is None else min(points, options.trials)
    if method in ("cmaes", "gp") and len(options.metric) > 1:
        raise UserError(f"sweep.method={method}: it optimizes one metric", "use sweep.method=tpe for several")
    if options.prune and len(options.metric) > 1:
        raise UserError("sweep.prune needs a single metric", "remove it, or all metrics but one")
    return method, options.trials or _DEFAULT_TRIALS


def _spec(arguments: argparse.Namespace, space: Space, options: SweepOptions, method: Method, count: int) -> Spec:
    """Return the spec as far as it is known before a point was composed."""
    until = deadline(options.until)
    if until is not None and until <= time.time():
        raise UserError(f"sweep.until={options.until} has passed", "name a later time")
    return Spec(
        revision=0,
        id="",
        name="",
        command=list(arguments.overrides),
        fixed=space.fixed,
        parameters=space.parameters,
        method=method,
        trials=count,
        seed=options.seed,
        metric=list(options.metric),
        direction=list(options.direction),
        generation=options.generation,
        at_once=options.at_once,
        prune=options.prune,
        prune_after=options.prune_after,
        prune_factor=options.prune_factor,
        max_failure_rate=options.max_failure_rate,
        max_gpu_hours=options.max_gpu_hours,
        max_cost=options.max_cost,
        until=until,
        startup_trials=options.startup_trials,
        custom_search_space=options.custom_search_space,
        cwd=os.getcwd(),
        config_name=arguments.config_name,
        config_dirs=[str(folder) for folder in arguments.config_dir],
        runs_dir="",
    )


def _custom(draft: Spec, where: dict[str, Any]) -> CustomSpace | None:
    """Return the function that adds parameters to the trials; None if there is none."""
    if draft.custom_search_space is None:
        return None
    from trainer.sweeps.custom import CustomSpace

    return CustomSpace(draft.custom_search_space, draft.fixed, Path.cwd(), **where)


def _corners(space: Space, custom: CustomSpace | None) -> list[list[str]]:
    """Return points that show what an adaptive search may try: each choice, and both ends of each range.

    Of what a function adds: the middle at each of these points, and both ends at the first.
    """
    middle = {one.key: scaled(one, 0.5) for one in space.parameters}
    points = [middle]
    for one in space.parameters:
        ends = one.choices if one.kind == "choice" else [scaled(one, 0.0), scaled(one, 1.0)]
        points += [{**middle, one.key: value} for value in ends]
    if custom is not None:
        shares = [(point, 0.5) for point in points] + [(middle, 0.0), (middle, 1.0)]
        points = [{**point, **_added(custom, point, share)} for point, share in shares]
    return [overrides_of(space.fixed, point) for point in points]


def _added(custom: CustomSpace, point: dict[str, str], share: float) -> dict[str, str]:
    return custom.extended(0, point, lambda one: scaled(one, share)).added


def _check_points(points: list[list[str]], where: dict[str, Any]) -> tuple[Job, tuple[int, int], list[str]]:
    """Compose and check the points; return the first as a job, the largest (world size, GPUs) and notes.

    A composed point is dropped once it is checked. They share what Hydra loads, and what the cluster validates.
    """
    loaded, asked = Loaded(), set[str]()
    first: Composed | None = None
    job: Job | None = None
    widest, notes = (1, 0), dict[str, None]()

    def is_new(request: str) -> bool:
        is_known = request in asked
        asked.add(request)
        return not is_known

    for number, overrides in enumerate(points):
        try:
            one = compose(overrides, number=number, after=first, loaded=loaded, **where)
            shape, sources = check_one(one, ask_cluster=is_new)
            if job is None:
                first, job = one, Job(one, shape, frozen_hydra(one), sources)
            else:
                require_free_link(one)
        except TrainerError as error:
            raise name_point(error, overrides, len(points)) from None
        notes.update(dict.fromkeys(one.notes))
        gpus = shape.world_size if shape.device == "cuda" else 0
        widest = max(widest[0], shape.world_size), max(widest[1], gpus)
    assert job is not None
    freeze_shape(job.config, job.shape)
    return job, widest, list(notes)


def _completed(draft: Spec, first: Job, widest: tuple[int, int]) -> Spec:
    config = first.config
    cluster = str(config["cluster"]["name"])
    metric, direction = draft.metric, draft.direction
    monitor = config["checkpoint"].get("monitor")
    if not metric and monitor is not None and config["checkpoint"].get("mode") is not None:
        metric = [str(monitor)]
        direction = ["maximize" if config["checkpoint"]["mode"] == "max" else "minimize"]
    at_once = draft.at_once or (config["cluster"].get("sweep_at_once") if cluster == "slurm" else None)
    return replace(
        draft,
        name=str(config["name"]),
        metric=metric,
        direction=direction,
        at_once=at_once,
        cluster=cluster,
        world_size=widest[0],
        gpus=widest[1],
        host=socket.gethostname() if cluster == "local" else None,
        runs_dir=str(Path(config["runs_dir"]).expanduser().absolute()),
    )


def create(prepared: Prepared) -> SweepDirectory:
    """Create the directory of the sweep, with all that its trials need. `spec.json` is written last.

    Raises:
        EnvironmentFault: It cannot be written.
    """
    from trainer.runs.code_snapshot import snapshot
    from trainer.runs.manifest import manifest_of

    spec, config = prepared.spec, prepared.first.config
    runs_dir = Path(spec.runs_dir)
    require_utf8(Path(spec.cwd), runs_dir)
    sweep = SweepDirectory.new(sweeps_dir_of(runs_dir), spec.name)
    root = Path(spec.cwd)
    copied = snapshot(root, sweep.path / "code", leave_out=runs_dir)
    choices = {group: option for group, option in prepared.first.composed.choices.items() if option is not None}
    manifest = manifest_of(choices, copied, config.get("data"), root)
    try:
        write_atomic(sweep.manifest_path, json.dumps(manifest, indent=1))
        write_atomic(sweep.path / "base.yaml", freeze(config))
    except OSError as error:
        raise EnvironmentFault(f"{sweep.path}: cannot be written: {error.strerror}", "free space") from None
    folders = [_freeze_configs(sweep, number, root / folder) for number, folder in enumerate(spec.config_dirs)]
    sweep.add_trials(prepared.trials)
    sweep.write_spec(replace(spec, id=sweep.id, code=copied.paths[0], config_dirs=folders))
    return sweep


def _freeze_configs(sweep: SweepDirectory, number: int, folder: Path) -> str:
    """Copy the YAML files of a `--config-dir` into the sweep, and return the name of the copy."""
    name = f"conf-{number}"
    target = sweep.path / name
    target.mkdir()
    try:
        for file in sorted(folder.rglob("*.yaml")):
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    except OSError as error:
        raise EnvironmentFault(f"{error.filename}: {error.strerror}", "--config-dir must be readable") from None
    return name


def with_plan(prepared: Prepared, arguments: argparse.Namespace) -> tuple[Prepared, float]:
    """Return the sweep with what the first trial is planned to take, and the most GPU hours of all; 0: not known.

    Raises:
        UserError: It cannot fit in memory, and the command line has no `--anyway`.
    """
    from trainer.cli.approval import gpu_hours, plan_of, refuse_what_cannot_fit

    found = plan_of(prepared.first)
    if found is not None and not arguments.anyway:
        refuse_what_cannot_fit(prepared.first, found)
    hours = gpu_hours(prepared.first, found) * prepared.spec.trials
    forecast = None if found is None else found.plan.forecast
    if forecast is None:
        return prepared, hours
    on_gpu = prepared.first.shape.device == "cuda"
    each = forecast.device_hours if on_gpu else None
    return replace(prepared, spec=replace(prepared.spec, planned_gpu_hours=each, planned_cost=forecast.cost)), hours


def confirmed(prepared: Prepared, hours: float, arguments: argparse.Namespace) -> bool:
    """Ask about a sweep above `cluster.confirm_above_gpu_hours`, and return whether to start it."""
    limit = prepared.first.config["cluster"].get("confirm_above_gpu_hours")
    if limit is None or hours <= limit or arguments.yes or not sys.stdin.isatty():
        return True
    return agrees(f"up to {hours:.4g} GPU hours, more than cluster.confirm_above_gpu_hours={limit:g}. Start?")


def plan(prepared: Prepared) -> list[str]:
    """Return the plan of the whole sweep, as lines."""
    spec = prepared.spec
    drawn = "points" if spec.method == "grid" else "trials"
    lines = [("sweep", f"{spec.method}, {spec.trials} {drawn}" + (f", pruned by {spec.prune}" if spec.prune else ""))]
    lines += [("  " + one.key, _range(one.choices, one.low, one.high, one.log)) for one in spec.parameters]
    lines += [("  and", f"what {spec.custom_search_space} adds")] if spec.custom_search_space else []
    at_once = str(spec.at_once) if spec.at_once else _slots_here(spec)
    lines.append(("at once", at_once))
    limits = {
        "GPU hours": spec.max_gpu_hours,
        "cost": spec.max_cost,
        "failed": f"{spec.max_failure_rate:.0%}" if spec.max_failure_rate is not None else None,
        "until": time.strftime("%Y-%m-%d %H:%M", time.localtime(spec.until)) if spec.until else None,
    }
    given = [f"{name} {value}" for name, value in limits.items() if value is not None]
    lines += [("limits", ", ".join(given))] if given else []
    width = max(len(name) for name, _ in lines)
    first = [f"{name:<{width}}  {text}" for name, text in describe(prepared.first)]
    return [*(f"{name:<{width}}  {text}" for name, text in lines), "each trial, such as the first:", *first]


def _slots_here(spec: Spec) -> str:
    if spec.cluster != "local":
        return "all, as SLURM has nodes"
    from trainer.sweeps.slots import most_slots

    return f"{most_slots(spec)} (as many as have devices of their own here)"


def _range(choices: list[str], low: float, high: float, log: bool) -> str:
    if choices:
        return ", ".join(choices[:6]) + (f", ... ({len(choices)} values)" if len(choices) > 6 else "")
    return f"{low:g} to {high:g}" + (", logarithmic" if log else "")
