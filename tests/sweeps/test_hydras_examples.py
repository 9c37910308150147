"""The examples of Hydra's documentation of its sweepers: run as written, or refused with what to write instead.

The texts are those of https://hydra.cc/docs/plugins/optuna_sweeper, nevergrad_sweeper and ax_sweeper, of
tutorials/basic/running_your_app/multi-run and of upgrades/1.1_to_1.2/changes_to_sweeper_config. A job is added, because
here a config is that of a training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trainer.cli import sweep_launch
from trainer.cli.sweep_launch import Prepared, prepare
from trainer.core.errors import TrainerError

JOB = ["+model=mlp", "+data=digits", "+trainer.max_steps=4", "tracking=none", "+resources.gpus=0"]
SPHERE = """
defaults:
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: tpe

hydra:
  sweeper:
    sampler:
      seed: 123
    direction: minimize
    study_name: sphere
    storage: null
    n_trials: 20
    n_jobs: 1
    max_failure_rate: 0.0
    params:
      x: range(-5.5, 5.5, step=0.5)
      y: choice(-5 ,0 ,5)

x: 1
y: 1
z: 1
"""
SEVERAL = """
defaults:
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: nsgaii

hydra:
  sweeper:
    sampler:
      seed: 123
    direction: [minimize, minimize]
    study_name: multi-objective
    storage: null
    n_trials: 20
    n_jobs: 1
    params:
      x: range(0, 5, step=0.5)
      y: range(0, 3, step=0.5)

x: 1
y: 1
"""
CUSTOM = """
defaults:
  - override hydra/sweeper: optuna

hydra:
  sweeper:
    sampler:
      seed: 123
    direction: minimize
    study_name: custom-search-space
    storage: null
    n_trials: 20
    n_jobs: 1

    params:
      x: range(-5.5, 5.5, 0.5)
      y: choice(-5, 0, 5)
    # `custom_search_space` should be a dotpath pointing to a
    # callable that provides search-space configuration logic:
    custom_search_space: .custom-search-space-objective.configure

x: 1
y: 1
z: 100
max_z_difference_from_x: 0.5
"""
CONFIGURE = """
def configure(cfg, trial) -> None:
    x_value = trial.params["x"]
    trial.suggest_float(
        "z",
        x_value - cfg.max_z_difference_from_x,
        x_value + cfg.max_z_difference_from_x,
    )
    trial.suggest_float("+w", 0.0, 1.0)  # note +w here, not w as w is a new parameter
"""
OLD_SPACE = """
defaults:
  - override hydra/sweeper: optuna
hydra:
  sweeper:
    search_space:
      x:
        type: float
        low: -5.5
        high: 5.5
        step: 0.5
      'y':
        type: categorical
        choices: [-5, 0, 5]
x: 1
y: 1
"""
PLAIN = "x: 1\ny: 1\n"
SWEEPER_OF_FILE = "x: 1\nhydra: {mode: MULTIRUN, sweeper: {params: {x: '1,2', seed: 'range(0,3)'}}}\n"


@dataclass(frozen=True)
class Example:
    """A documented example: its primary config, its command line, and what becomes of it."""

    config: str
    overrides: list[str] = field(default_factory=list)
    method: str = ""
    trials: int = 0
    keys: tuple[str, ...] = ("x", "y")
    refused: str = ""
    """Text of the message and its advice."""


EXAMPLES = {
    # Basic sweeper.
    "values": Example(PLAIN, ["x=1,2", "y=3,4,5"], "grid", 6),
    "range": Example(PLAIN, ["x=range(1,10)"], "grid", 9, ("x",)),
    "glob": Example(PLAIN, ["optimizer=glob(a*,exclude=adam)"], "grid", 5, ("optimizer",)),
    "in the config": Example(SWEEPER_OF_FILE, [], "grid", 6, ("x", "seed")),
    "max_batch_size": Example(PLAIN, ["hydra.sweeper.max_batch_size=2", "x=1,2"], refused="hydra.sweeper.max_batch"),
    # Optuna.
    "sphere": Example(SPHERE, [], "tpe", 20),
    "sphere, intervals": Example(SPHERE, ["x=interval(-5.0, 5.0)", "y=interval(0, 10)"], "tpe", 20),
    "sphere, int and log": Example(SPHERE, ["x=int(interval(-5.0, 5.0))", "y=tag(log, interval(1, 10))"], "tpe", 20),
    "sphere, ranges": Example(SPHERE, ["x=range(-5.0, 5.0)", "y=shuffle(range(-5, 5))"], "tpe", 20),
    "sphere, choices": Example(SPHERE, ["x=choice(-5.0, 0.0, 5.0)", "y=choice(0, 1, 2, 3, 4, 5)"], "tpe", 20),
    "sphere, fixed": Example(SPHERE, ["x=1"], "tpe", 20, ("y",)),
    "sphere, random": Example(SPHERE, ["hydra/sweeper/sampler=random"], "random", 20),
    "sphere, cmaes": Example(SPHERE, ["hydra/sweeper/sampler=cmaes"], "cmaes", 20),
    "sphere, grid": Example(SPHERE.replace("sampler: tpe", "sampler: grid"), [], "grid", 20),
    "sphere, qmc": Example(SPHERE, ["hydra/sweeper/sampler=qmc"], "sobol", 20),
    "sphere, storage": Example(SPHERE, ["hydra.sweeper.storage=sqlite:///a.db"], refused="trainer sweep export"),
    "several": Example(SEVERAL, [], refused="use one of tpe, which also takes several metrics"),
    "several, tpe": Example(SEVERAL, ["hydra/sweeper/sampler=tpe"], refused="add sweep.metric=[val/loss,val/acc]"),
    "several, tpe, metrics": Example(
        SEVERAL, ["hydra/sweeper/sampler=tpe", "sweep.metric=[val/loss,train/loss]"], "tpe", 20
    ),
    "sequence": Example(
        SPHERE, ["+hydra.sweeper.experiment_sequence=a.B"], refused="hydra.sweeper.experiment_sequence: not supported"
    ),
    "sampler's options": Example(SPHERE, ["hydra.sweeper.sampler.n_ei_candidates=9"], refused="n_ei_candidates=9: not"),
    "custom": Example(CUSTOM, [], "tpe", 20),
    "custom, random": Example(CUSTOM, ["hydra/sweeper/sampler=random"], "random", 20),
    "custom, grid": Example(CUSTOM, ["hydra/sweeper/sampler=grid"], refused="write sweep.method=sobol"),
    "custom, fixed": Example(CUSTOM, ["z=5"], refused="z has a fixed value"),
    "1.1": Example(OLD_SPACE, [], refused="write hydra.sweeper.params"),
    # Others.
    "nevergrad": Example(PLAIN, ["hydra/sweeper=nevergrad", "x=1,2"], refused="sweep.method=tpe"),
    "ax": Example(PLAIN, ["hydra/sweeper=ax", "x=int(interval(-5, 5))"], refused="sweep.method=tpe"),
    "orion": Example("defaults: [{override hydra/sweeper: orion}]\nx: 1\n", ["x=1,2"], refused="sweep.method=tpe"),
}


def prepared(folder: Path, example: Example) -> Prepared:
    (folder / "conf").mkdir()
    (folder / "conf/config.yaml").write_text(example.config)
    (folder / "custom-search-space-objective.py").write_text(CONFIGURE)
    sys.modules.pop("custom-search-space-objective", None)  # of another project
    return prepare(argparse.Namespace(overrides=[*JOB, *example.overrides], config_dir=[], config_name="config"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_written_or_is_refused_with_what_to_write(
    name: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, check = EXAMPLES[name], sweep_launch._check_points
    # The last point is composed and checked: that all are is another test's.
    monkeypatch.setattr(sweep_launch, "_check_points", lambda points, where: check(points[-1:], where))
    if example.method in ("tpe", "cmaes"):
        pytest.importorskip("optuna")
    if example.refused:
        with pytest.raises(TrainerError) as caught:
            prepared(workdir, example)
        assert example.refused in str(caught.value)
        return
    found = prepared(workdir, example)
    assert (found.spec.method, found.spec.trials) == (example.method, example.trials)
    assert {one.key for one in found.spec.parameters} == set(example.keys)
    for trial in found.trials:
        assert set(example.keys) <= trial.values.keys()
        if name == "custom, random":
            assert abs(float(trial.values["z"]) - float(trial.values["x"])) <= 0.5
            assert 0 <= float(trial.values["+w"]) <= 1
            assert trial.overrides[-2:] == [f"z={trial.values['z']}", f"+w={trial.values['+w']}"]
