"""The options of a sweep, `sweep.*` on the command line or the section `sweep` of a config file, and Hydra's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Annotated, Any

from trainer.config.hydra_node import part_of
from trainer.config.limits import AtLeast, NonNegativeInt, PositiveFloat, PositiveInt, Share, limits_of
from trainer.config.optuna_sweeper import KEYS, SAMPLERS, TARGET
from trainer.config.problems import raise_all
from trainer.config.typed import key_names, options_of, type_problem, unknown_key
from trainer.core.errors import UserError
from trainer.sweeps.records import Direction, Method, Pruner


@dataclass(eq=False, repr=False)
class SweepOptions:
    """How a sweep searches, and when it ends."""

    method: Method | None = None
    """grid, random, sobol, tpe, cmaes or gp; null: grid, or sobol if `trials` is set or a parameter is an interval."""
    trials: PositiveInt | None = None
    """Number of trials; null: all points of a grid, else 20."""
    seed: NonNegativeInt = 0
    """Seed of the search. The seed of the trainings is `seed`."""
    metric: list[str] = field(default_factory=list)
    """Names of the metrics in metrics.jsonl; none: that by which a run chooses its best checkpoint."""
    direction: list[Direction] = field(default_factory=list)
    """minimize or maximize, for each metric; none: known from the metric."""
    generation: PositiveInt | None = None
    """Ask tpe, cmaes and gp for so many trials at a time, from the results of earlier ones only, so that a repeated
    sweep asks for the same; null: each from the results that exist when it starts."""
    at_once: PositiveInt | None = None
    """Most trials that run at the same time; null: as many as this machine has devices for, on SLURM all."""
    prune: Pruner | None = None
    """Stop trials early that fall behind: asha, hyperband or median; null: none."""
    prune_after: PositiveInt = 1
    """Validations before a trial may be pruned."""
    prune_factor: Annotated[int, AtLeast(2)] = 3
    """asha and hyperband keep one of so many trials at each rung."""
    max_failure_rate: Annotated[float, Share()] | None = None
    """Start no further trial once more than this share of the ended ones has failed; null: no limit."""
    max_gpu_hours: PositiveFloat | None = None
    """Start no further trial that would exceed so many GPU hours, with those that run; null: no limit."""
    max_cost: PositiveFloat | None = None
    """Start no further trial that would exceed this cost, in the currency of cluster prices; null: no limit."""
    until: str | None = None
    """Start no trial after this time of this machine, such as 2026-01-31 or '2026-01-31 18:00'; null: no limit."""
    custom_search_space: str | None = None
    """Dotted path of a function of this project, called with the configuration and the trial, that adds parameters to
    each trial by `trial.suggest_float` and the like; null: none."""
    startup_trials: PositiveInt = 10
    """Trials that tpe and gp draw at random first."""


_HYDRAS_DIRECTION = "hydra.sweeper.direction"
"""Used with a named metric only: the direction of the metric of the best checkpoint is known."""
_METHODS: dict[str, Method] = {
    "TPESampler": "tpe",
    "RandomSampler": "random",
    "CmaEsSampler": "cmaes",
    "GPSampler": "gp",
    "QMCSampler": "sobol",
    "GridSampler": "grid",
}


def read_options(tree: Any, control: dict[str, Any]) -> SweepOptions:
    """Return the options of a sweep. The command line wins over the section `sweep`, that over `hydra.sweeper`.

    Args:
        tree: The composed tree of the sweep.
        control: The keys of `sweep.*` on the command line.

    Raises:
        UserError: A key is unknown, or a value is invalid.
    """
    from omegaconf import OmegaConf

    section: Any = {}
    if "sweep" in tree.keys():  # noqa: SIM118  `in tree` would resolve the value
        section = OmegaConf.to_container(tree._get_node("sweep"), resolve=False)
    if not isinstance(section, dict):
        raise UserError(f"sweep={section}: expected a section with keys", "write sweep.trials=20")
    node = {**_of_hydra(tree), **section, **control}
    if "optimized_metric" in tree.keys() and tree.get("optimized_metric"):  # noqa: SIM118
        node.setdefault("metric", tree.optimized_metric)  # of the lightning-hydra-template
    directions = node.pop(_HYDRAS_DIRECTION, None)
    if node.get("metric") and directions:
        node.setdefault("direction", directions)
    elif directions and len(directions) > 1:
        raise UserError("hydra.sweeper.direction: several need their metrics", "add sweep.metric=[val/loss,val/acc]")
    for key in ("metric", "direction"):
        if isinstance(node.get(key), str):
            node[key] = [node[key]]
    known = key_names(SweepOptions)
    problems: list[Any] = [unknown_key("sweep.", str(key), known) for key in node if key not in known]
    problems += [one for key in node if key in known and (one := type_problem(SweepOptions, "sweep.", key, node[key]))]
    raise_all(problems)
    options = options_of(SweepOptions, node)
    limits = limits_of(SweepOptions)
    values = {one.name: getattr(options, one.name) for one in fields(options)}
    found = [
        limits[key].problem(f"sweep.{key}", value)
        for key, value in values.items()
        if key in limits and type(value) is not list and value is not None
    ]
    if options.metric and options.direction and len(options.metric) != len(options.direction):
        found.append(UserError("sweep.metric and sweep.direction differ in length", "write one direction a metric"))
    if options.direction and not options.metric:
        found.append(UserError("sweep.direction needs its metric", "write sweep.metric=val/loss too"))
    raise_all([one for one in found if one])
    return options


def deadline(text: str | None) -> float | None:
    """Return `sweep.until` in seconds since 1970.

    Raises:
        UserError: It is no date.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        raise UserError(f"sweep.until={text}: not a date", "write 2026-01-31 or '2026-01-31 18:00'") from None


def _unused(node: dict[str, Any], sampler: dict[str, Any]) -> Iterator[UserError]:
    """Yield an error for each key of Hydra's Optuna sweeper that was set and would have no effect."""
    for key in node.keys() - KEYS:
        yield UserError(f"hydra.sweeper.{key}: not supported", "remove it")
    defaults = {key: value for _, keys in SAMPLERS.values() for key, value in keys.items()}
    for key, value in sampler.items():
        if key not in _SAMPLERS_KEYS and value is not None and value != defaults.get(key):
            yield UserError(f"hydra.sweeper.sampler.{key}={value}: not supported", "remove it")


_SAMPLERS_KEYS = (
    *("_target_", "_partial_", "seed", "n_startup_trials"),
    *("multivariate", "constant_liar", "warn_independent_sampling"),
)
"""Keys of a sampler that are read, or whose effect tpe always has."""


def _of_hydra(tree: Any) -> dict[str, Any]:
    """Return the options that `hydra/sweeper=optuna` sets."""
    node = part_of(tree.hydra, "sweeper")
    if node.get("_target_") != TARGET:
        return {}
    sampler = node.get("sampler") or {}
    name = str(sampler.get("_target_")).rpartition(".")[2]
    if name not in _METHODS:
        fix = "use one of tpe, which also takes several metrics, random, cmaes, gp, qmc, grid"
        raise UserError(f"hydra/sweeper/sampler: {name} is not supported", fix)
    raise_all(list(_unused(node, sampler)))
    if node.get("search_space"):
        raise UserError(
            "hydra.sweeper.search_space: replaced by hydra.sweeper.params in Hydra 1.2",
            "write hydra.sweeper.params with entries such as optimizer.lr: interval(0.001, 0.1)",
        )
    if node.get("storage") is not None:
        fix = "remove it: the files of the sweep are its storage; trainer sweep export SWEEP writes one of Optuna"
        raise UserError("hydra.sweeper.storage: not supported", fix)
    options: dict[str, Any] = {
        "method": _METHODS[name],
        "trials": node.get("n_trials"),
        "at_once": node.get("n_jobs"),
        "max_failure_rate": node.get("max_failure_rate"),
        "custom_search_space": node.get("custom_search_space"),
        _HYDRAS_DIRECTION: node.get("direction")
        if isinstance(node.get("direction"), list)
        else [str(node["direction"])],
    }
    if sampler.get("seed") is not None:
        options["seed"] = sampler["seed"]
    if sampler.get("n_startup_trials") is not None:
        options["startup_trials"] = sampler["n_startup_trials"]
    return options
