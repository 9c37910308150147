"""Let Optuna suggest a point: a pure function of the spec, the ended trials and the number of the trial.

Optuna's own storages are not used: its study is rebuilt in memory for every question, and its sampler is seeded with
the seed of the sweep and the number of the trial. So any process may ask, and none need remember anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.core.errors import EnvironmentFault
from trainer.core.install import pip_install
from trainer.sweeps import decide
from trainer.sweeps.evolution import evolve
from trainer.sweeps.past import Past, fits, seed_of
from trainer.sweeps.records import Direction, Parameter, Spec, Trial

if TYPE_CHECKING:
    from trainer.sweeps.custom import CustomSpace


def suggest(
    spec: Spec,
    past: Sequence[Past],
    directions: Sequence[Direction],
    number: int,
    custom: CustomSpace | None = None,
) -> Trial:
    """Return trial `number`, with its point.

    Args:
        spec: The spec, with an adaptive method.
        past: The earlier trials. TPE keeps away from those that are not over.
        directions: One for each objective.
        number: Number of the trial.
        custom: Adds parameters.

    Raises:
        EnvironmentFault: Optuna is not installed.
        UserError: The user's function raises an exception.
    """
    if spec.method == "cmaes":
        return decide.trial_of(spec, number, evolve(spec, past, directions[0], number), custom)
    study = study_of(spec, past, directions, sampler=_sampler(spec, number, len(directions)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = study.ask({one.key: distribution(one) for one in spec.parameters})
        values = {one.key: _written(one, asked.params[one.key]) for one in spec.parameters}
        if custom is None:
            return decide.trial_of(spec, number, values)
        added = custom.extended(number, values, lambda one: _written(one, asked._suggest(one.key, distribution(one))))
    return decide.extended(spec, number, values, added)


def study_of(spec: Spec, past: Sequence[Past], directions: Sequence[Direction], sampler: Any = None) -> Any:
    """Return an in-memory study with the trials in the order of their numbers.

    Raises:
        EnvironmentFault: Optuna is not installed.
    """
    optuna = load()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=list(directions), sampler=sampler, study_name=f"{spec.name}-{spec.id}")
    study.add_trials([trial_of(spec, one) for one in sorted(past, key=lambda one: one.number)])
    return study


def trial_of(spec: Spec, one: Past) -> Any:
    """Return a trial as Optuna's frozen trial."""
    optuna = load()
    states = optuna.trial.TrialState
    space = [*spec.parameters, *one.added]
    known = {parameter.key: parameter for parameter in space if fits(parameter, one.values.get(parameter.key, ""))}
    params = {key: _read(parameter, one.values[key]) for key, parameter in known.items()}
    state = states.PRUNED if one.pruned else states.COMPLETE if one.objective is not None else states.FAIL
    state = state if one.is_over else states.RUNNING
    return optuna.trial.create_trial(
        state=state,
        params=params,
        distributions={key: distribution(parameter) for key, parameter in known.items()},
        values=list(one.objective) if one.objective is not None and state == states.COMPLETE else None,
        intermediate_values=dict(one.curve) if len(one.objective or ()) <= 1 else {},
        user_attrs={"trial": one.number},
    )


def distribution(parameter: Parameter) -> Any:
    """Return Optuna's distribution of a parameter."""
    kinds = load().distributions
    if parameter.kind == "choice":
        return kinds.CategoricalDistribution(parameter.choices)
    if parameter.kind == "int":
        whole = int(parameter.step or 1) if not parameter.log else 1
        return kinds.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=whole)
    step = None if parameter.log else parameter.step
    return kinds.FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=step)


def load() -> Any:
    """Return the module optuna.

    Raises:
        EnvironmentFault: It is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import optuna
    except ImportError:
        fix = f"{pip_install('sweep')}; grid, random and sobol need nothing"
        raise EnvironmentFault("tpe, cmaes and gp need the package optuna", fix) from None
    return optuna


def _sampler(spec: Spec, number: int, objectives: int) -> Any:
    samplers = load().samplers
    seed = seed_of(spec, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate and constant_liar are marked experimental
        if spec.method == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=spec.startup_trials)
        return samplers.TPESampler(
            seed=seed,
            n_startup_trials=spec.startup_trials,
            multivariate=objectives == 1,
            constant_liar=True,
            warn_independent_sampling=False,
        )


def _read(parameter: Parameter, text: str) -> Any:
    if parameter.kind == "choice":
        return text
    return int(float(text)) if parameter.kind == "int" else float(text)


def _written(parameter: Parameter, value: Any) -> str:
    return repr(value) if parameter.kind == "float" else str(value)
