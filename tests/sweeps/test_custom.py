"""Parameters that a function of the project adds: whatever method searches, they follow from seed, number and files."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest

from trainer.cli.sweep_extend import extend
from trainer.cli.sweep_launch import create, prepare
from trainer.core.errors import UserError
from trainer.sweeps.advance import acquire, ask
from trainer.sweeps.analysis import table_of
from trainer.sweeps.custom import CustomSpace, CustomTrial, drawn
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import settle, views
from trainer.sweeps.records import Parameter, Result

JOB = ["experiment=quickstart", "debug=fast", "model.hidden=[8]", "tracking=none", "resources.gpus=0"]
SPACE = ["seed=range(0,9)", "optimizer.lr=tag(log,interval(1e-4,1e-1))"]
OWN = """
import helper


def configure(cfg, trial):
    assert cfg.model.hidden == [8]
    if trial.params["seed"] % 2:
        trial.suggest_float("optimizer.weight_decay", 0.0, trial.params["optimizer.lr"])
    kind = trial.suggest_categorical("+note", ["it's", 3, None, "a,b"])
    assert kind in helper.KINDS
    trial.suggest_int("data.batch_size", 16, 64, step=16)


def fails(cfg, trial):
    raise ValueError("no such space")


def fails_later(cfg, trial):
    if trial.number == 2:
        raise ValueError("not this one")
    configure(cfg, trial)
"""


@pytest.fixture
def project(workdir: Path, request: pytest.FixtureRequest) -> str:
    """The name of the module with the functions."""
    name = f"own_{abs(hash(request.node.name))}"
    (workdir / f"{name}.py").write_text(OWN)
    (workdir / "helper.py").write_text("KINDS = (\"it's\", 3, None, 'a,b')\n")
    return name


def forget(*modules: str) -> None:
    """Forget the modules of another project, or of another copy: each command is a process of its own."""
    for name in ("helper", *modules):
        sys.modules.pop(name, None)


def made(*overrides: str) -> SweepDirectory:
    forget()
    arguments = argparse.Namespace(overrides=[*JOB, *SPACE, *overrides], config_dir=[], config_name="config")
    return create(prepare(arguments))


def judge(sweep: SweepDirectory, number: int) -> None:
    trial = sweep.trial(number)
    assert ("optimizer.weight_decay" in trial.values) == bool(int(trial.values["seed"]) % 2)
    if "optimizer.weight_decay" in trial.values:
        assert 0 <= float(trial.values["optimizer.weight_decay"]) <= float(trial.values["optimizer.lr"])
    assert int(trial.values["data.batch_size"]) in (16, 32, 48, 64)
    assert [one.key for one in trial.parameters] == list(trial.values)[2:]
    assert f"+note={trial.values['+note']}" in trial.overrides


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_points_are_drawn_at_the_launch_and_by_an_extension(project: str, method: str) -> None:
    options = [f"sweep.custom_search_space={project}.configure", f"sweep.method={method}"]
    sweep, longer = made(*options, "sweep.trials=4"), made(*options, "sweep.trials=6")
    forget(project)
    extend(sweep, 2, [])
    assert [sweep.trial(number) for number in range(6)] == [longer.trial(number) for number in range(6)]
    for number in range(6):
        judge(sweep, number)
    assert len({sweep.trial(number).values["optimizer.lr"] for number in range(6)}) == 6
    spec = sweep.spec()
    table = table_of(sweep, spec, views(sweep, None))
    assert table.parameters[:2] == ["seed", "optimizer.lr"]
    assert set(table.parameters[2:]) == {"optimizer.weight_decay", "+note", "data.batch_size"}


@pytest.mark.parametrize("method", ["tpe", "cmaes"])
def test_a_question_is_answered_from_the_frozen_code(project: str, method: str, workdir: Path) -> None:
    pytest.importorskip("optuna")
    options = [f"sweep.custom_search_space={project}.fails_later", f"sweep.method={method}", "sweep.startup_trials=2"]
    sweep = made(*options, "sweep.trials=8")
    (workdir / f"{project}.py").unlink()
    twin = made_like(sweep, workdir)
    for one in (sweep, twin):
        forget(project)
        for number in range(6):
            spec = one.spec()
            ask(one, spec, settle(one, spec, views(one, None)), number)
            result = Result(state="finished", values=[float(number % 4)], metric="val/loss", mode="min", time=0.0)
            one.add_result(number, 0, result)
    for number in range(6):
        assert sweep.trial(number) == twin.trial(number)
        if number != 2:
            judge(sweep, number)
    failed = sweep.result(2, 0)
    assert failed is not None
    assert (failed.state, failed.run) == ("failed", None)
    assert "ValueError: not this one" in failed.reason
    forget(project)
    claim = acquire(sweep)
    assert not isinstance(claim, str)
    assert claim.trial.number == 6, "a trial without a point is never trained"


def made_like(sweep: SweepDirectory, folder: Path) -> SweepDirectory:
    """Return another sweep with the same spec and code."""
    copy = folder / "sweeps" / f"{sweep.name}-copycopy"
    shutil.copytree(sweep.path, copy)
    return SweepDirectory(copy)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.system", "not a function of this project"),
        ("shutil.rmtree", "not a function of this project"),
        ("optuna.create_study", "not a function of this project"),
        ("configure", "not a function of this project"),
        ("..own.configure", "not a function of this project"),
        ("own.Text", "not a function of this project"),
        ("own.configur", "not a function of this project"),
        ("own.getcwd", "not a function of this project"),
        ("own.broken", "ValueError: no such space (own.py:"),
        ("own.overlaps", "ValueError: tracking has a fixed value"),
        ("own.empty", "ValueError: k: no choices"),
        ("own.object", "cannot be written as an override"),
        ("bad.configure", "SyntaxError"),
    ],
)
def test_what_cannot_be_called_is_refused(path: str, message: str, workdir: Path) -> None:
    (workdir / "own.py").write_text(
        "from os import getcwd\n"
        "class Text: pass\n"
        "def broken(cfg, trial): raise ValueError('no such space')\n"
        "def overlaps(cfg, trial): trial.suggest_float('tracking', 0, 1)\n"
        "def empty(cfg, trial): trial.suggest_categorical('k', [])\n"
        "def object(cfg, trial): trial.suggest_categorical('k', [Text()])\n"
    )
    (workdir / "bad.py").write_text("def configure(cfg, trial): pass\nraise SyntaxError('x')\n")
    forget("own", "bad")
    with pytest.raises(UserError) as caught:
        CustomSpace(path, JOB, workdir, config_dirs=[]).extended(0, {}, drawn(0, 0))
    assert message in str(caught.value)


def test_what_is_suggested_is_within_its_limits() -> None:
    for number in range(200):
        trial = CustomTrial(number, {"x": "2.5", "y": "-5"}, ["z=1"], drawn(0, number))
        assert trial.params == {"x": 2.5, "y": -5}
        assert trial.user_attrs == {"z": 1}
        stepped = trial.suggest_float("a", 0.0, 1.0, step=0.25)
        assert stepped in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert trial.suggest_float("a", 7.0, 8.0) == stepped, "the first call decides"
        assert trial.suggest_int("b", 1, 8, log=True) in range(1, 9)
        assert trial.suggest_float("c", 3.0, 3.0) == 3.0
        assert trial.suggest_categorical("d", ["true", True, "ä b", ""]) in ("true", True, "ä b", "")
        with pytest.raises(ValueError, match="not an interval"):
            trial.suggest_float("e", 2.0, 1.0)
        with pytest.raises(ValueError, match="fixed value"):
            trial.suggest_int("+z", 1, 2)


def test_optuna_learns_what_was_added() -> None:
    adaptive = pytest.importorskip("trainer.sweeps.adaptive")
    pytest.importorskip("optuna")
    from tests.sweeps.test_decisions import SPEC
    from trainer.sweeps.past import Past

    added = [Parameter(key="decay", kind="float", low=0.0, high=0.1), Parameter(key="k", kind="choice", choices=["1"])]
    values = {"lr": "0.1", "width": "3", "kind": "a", "decay": "0.05", "k": "1"}
    frozen = adaptive.trial_of(SPEC, Past(0, values, [1.0], added=added))
    assert frozen.params == {"lr": 0.1, "width": 3, "kind": "a", "decay": 0.05, "k": "1"}
    assert json.loads(json.dumps(frozen.params)) == frozen.params
