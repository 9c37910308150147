"""The grammar and the searches: Hydra's parser reads, and Hydra's basic sweeper is the oracle for grids."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from trainer.config.compose import points as hydras
from trainer.config.compose import swept
from trainer.core.errors import UserError
from trainer.sweeps.options import SweepOptions, read_options
from trainer.sweeps.points import points
from trainer.sweeps.records import Parameter
from trainer.sweeps.space import Space, overrides_of, size, space_of

JOB = "experiment=quickstart"


def space(*overrides: str, seed: int = 0) -> Space:
    found = swept([JOB, *overrides], config_dirs=[])
    assert found is not None
    return space_of(found[0], seed)


def options(*overrides: str) -> SweepOptions:
    found = swept([JOB, *overrides], config_dirs=[])
    assert found is not None
    return read_options(found[1], space_of(found[0], 0).control)


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1,2", "optimizer.lr=0.1,0.2,0.3"],
        ["seed=range(1,4)", "model=choice(mlp,resnet18)", "optimizer.lr=range(0,1,step=0.25)"],
        ["model=glob(vgg*)", "+trainer.note='a b',c", "seed=7"],
        ["optimizer=adamw,sgd", "data.batch_size=range(8,0,step=-2)", "optimizer.lr=sort(3,1,2)"],
    ],
)
def test_a_grid_has_the_points_of_hydras_sweeper_in_its_order(workdir: Path, overrides: list[str]) -> None:
    found = space(*overrides)
    ours = [
        overrides_of(found.fixed, one) for one in points(found.parameters, "grid", 0, 0, size(found.parameters) or 0)
    ]
    expected = hydras([JOB, *overrides], config_dirs=[])
    assert expected is not None
    assert [sorted(point) for point in ours] == [sorted(point) for point in expected]


def test_a_fixed_override_removes_a_parameter_of_a_file(workdir: Path) -> None:
    file = workdir / "conf/experiment/mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nhydra: {sweeper: {params: {seed: '1,2', optimizer.lr: 'interval(0.1,1)'}}}\n")
    assert [one.key for one in space("experiment=mine").parameters] == ["seed", "optimizer.lr"]
    assert [one.key for one in space("experiment=mine", "seed=3").parameters] == ["optimizer.lr"]


def test_intervals_and_tags() -> None:
    found = space(
        "optimizer.lr=tag(log,interval(1e-5,0.1))", "data.batch_size=int(interval(8,64))", "seed=shuffle(1,2,3)"
    )
    rate, batch, seed = found.parameters
    assert (rate.kind, rate.low, rate.high, rate.log) == ("float", 1e-5, 0.1, True)
    assert (batch.kind, batch.low, batch.high) == ("int", 8, 64)
    assert sorted(seed.choices) == ["1", "2", "3"]
    orders = {tuple(space("seed=shuffle(range(1,9))", seed=number).parameters[0].choices) for number in (0, 0, 1)}
    assert len(orders) == 2, "the shuffle follows the seed of the sweep"


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optimizer.lr=interval(2,1)", "LOW below HIGH"),
        ("optimizer.lr=tag(log,interval(0,1))", "above 0"),
        ("optimizer.lr=tag(odd,interval(0,1))", "tag(log"),
        ("model=glob(nothing*)", "A,B"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(override: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        space(override)
    assert fix in str(caught.value)


PARAMETERS = [
    Parameter(key="lr", kind="float", low=1e-4, high=1.0, log=True),
    Parameter(key="width", kind="int", low=1, high=8),
    Parameter(key="kind", kind="choice", choices=["a", "b", "c"]),
]


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_a_point_depends_on_seed_and_number_only(method: str) -> None:
    whole = points(PARAMETERS, method, 3, 0, 64)  # type: ignore[arg-type]
    assert whole[40:] == points(PARAMETERS, method, 3, 40, 24)  # type: ignore[arg-type]
    assert whole != points(PARAMETERS, method, 4, 0, 64)  # type: ignore[arg-type]
    assert {one["width"] for one in whole} == {str(width) for width in range(1, 9)}
    assert {one["kind"] for one in whole} == {"a", "b", "c"}
    logs = [math.log10(float(one["lr"])) for one in whole]
    assert all(-4 <= one <= 0 for one in logs)
    assert all(sum(low <= one < low + 1 for one in logs) >= 8 for low in (-4, -3, -2, -1)), "uniform in the logarithm"


def test_sobol_is_more_even_than_random() -> None:
    unit = [Parameter(key=key, kind="float", low=0.0, high=1.0) for key in "ab"]

    def empty(method: str) -> int:
        cells = {(int(float(p["a"]) * 8), int(float(p["b"]) * 8)) for p in points(unit, method, 0, 0, 64)}  # type: ignore[arg-type]
        return sum(cell not in cells for cell in itertools.product(range(8), range(8)))

    assert empty("sobol") < empty("random") / 3


def test_hydras_optuna_sweeper_is_read() -> None:
    found = options("hydra/sweeper=optuna", "hydra.sweeper.n_trials=7", "seed=1,2", "hydra.sweeper.sampler.seed=5")
    assert (found.method, found.trials, found.at_once, found.seed, found.max_failure_rate) == ("tpe", 7, 2, 5, 0.0)
    assert options("hydra/sweeper=optuna", "hydra/sweeper/sampler=cmaes").method == "cmaes"
    ours = options("hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "sweep.metric=val/acc", "sweep.trials=3")
    assert (ours.trials, ours.metric, ours.direction) == (3, ["val/acc"], ["maximize"])
    several = ["hydra.sweeper.direction=[minimize,maximize]", "sweep.metric=[val/loss,val/acc]"]
    assert options("hydra/sweeper=optuna", *several).direction == ["minimize", "maximize"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.trails=3", "did you mean sweep.trials"),
        ("sweep.trials=0", "at least 1"),
        ("sweep.method=tpee", "did you mean sweep.method=tpe"),
        ("sweep.direction=minimize", "sweep.metric"),
        ("sweep.prune_factor=1", "at least 2"),
        ("sweep.max_failure_rate=20", "from 0 to 1"),
        ("hydra/sweeper=optuna hydra/sweeper/sampler=nsgaii", "use one of"),
        ("hydra/sweeper=optuna hydra.sweeper.storage=sqlite:///a.db", "export"),
    ],
)
def test_an_invalid_option_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        options(*override.split())
    assert message in str(caught.value)
