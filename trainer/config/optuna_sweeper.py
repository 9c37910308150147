"""The config of Hydra's Optuna sweeper, so that `hydra/sweeper=optuna` composes without its package.

The keys are those of hydra-optuna-sweeper 1.2 (hydra_plugins/hydra_optuna_sweeper/config.py). `trainer sweep` reads
them (`sweeps/options.py`); nothing calls the targets.
"""

from __future__ import annotations

from typing import Any

TARGET = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tpe": (
        "optuna.samplers.TPESampler",
        {
            "consider_prior": True,
            "prior_weight": 1.0,
            "consider_magic_clip": True,
            "consider_endpoints": False,
            "n_startup_trials": 10,
            "n_ei_candidates": 24,
            "multivariate": False,
            "warn_independent_sampling": True,
        },
    ),
    "random": ("optuna.samplers.RandomSampler", {}),
    "cmaes": ("optuna.samplers.CmaEsSampler", {"warn_independent_sampling": True, "restart_strategy": None}),
    "gp": ("optuna.samplers.GPSampler", {"n_startup_trials": 10}),
    "qmc": ("optuna.samplers.QMCSampler", {}),
    "nsgaii": ("optuna.samplers.NSGAIISampler", {"population_size": 50}),
    "grid": ("optuna.samplers.GridSampler", {"_partial_": True}),
}
"""Sampler to its class and its keys beside `seed`."""
_UNSET = ("storage", "study_name", "search_space", "params", "custom_search_space")
KEYS = frozenset(("_target_", "defaults", "sampler", "direction", "n_trials", "n_jobs", "max_failure_rate", *_UNSET))
"""The keys of the sweeper."""


def register() -> None:
    """Store the config group, unless the package of the sweeper has stored it."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if "optuna.yaml" in store.repo.get("hydra", {}).get("sweeper", {}):
        return
    node = {
        "_target_": TARGET,
        "defaults": [{"sampler": "tpe"}, "_self_"],
        "direction": "minimize",
        **dict.fromkeys(_UNSET),
        "n_trials": 20,
        "n_jobs": 2,
        "max_failure_rate": 0.0,
    }
    store.store(group="hydra/sweeper", name="optuna", node=node, provider="trainer")
    for name, (target, keys) in SAMPLERS.items():
        store.store(
            group="hydra/sweeper/sampler",
            name=name,
            node={"_target_": target, "seed": None, **keys},
            provider="trainer",
        )
