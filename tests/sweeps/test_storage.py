"""The export: Optuna reads the trials of a sweep as its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.sweeps.test_arrays import SPEC
from trainer.core.errors import UserError
from trainer.sweeps import decide
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import settle, views
from trainer.sweeps.records import Result, ResultState

ENDS: list[tuple[ResultState, list[float] | None]] = [("finished", [0.5]), ("failed", None), ("finished", [0.25])]


@pytest.mark.filterwarnings("ignore")  # of SQLAlchemy and alembic
def test_an_exported_sweep_is_a_study(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    from trainer.sweeps.storage import write_storage

    spec = replace(SPEC, trials=4)
    sweep = SweepDirectory.new(tmp_path / "sweeps", "s")
    sweep.write_spec(spec)
    sweep.add_trials(decide.planned(spec, 0, 4))
    for number, (state, values) in enumerate(ENDS):
        sweep.add_result(number, 0, Result(state=state, values=values, metric="val/acc", mode="max", time=0.0))
    found = settle(sweep, spec, views(sweep, None))
    for _ in range(2):  # written again, it is replaced
        write_storage(sweep, spec, found, tmp_path / "optuna.db")
    study = optuna.load_study(study_name=sweep.path.name, storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert study.direction.name == "MAXIMIZE"
    assert study.best_trial.user_attrs == {"trial": 0}
    assert study.best_trial.params == {"x": float(sweep.trial(0).values["x"])}
    assert [one.state.name for one in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "RUNNING"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optuna.db", "sweeps"]
    with pytest.raises(UserError):
        write_storage(sweep, spec, found, tmp_path / "what?.db")
