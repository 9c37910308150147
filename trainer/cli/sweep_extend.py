"""Add trials to a sweep: more of a search, or the points of other values."""

from __future__ import annotations

from dataclasses import replace

from trainer.config.compose import Loaded, compose, swept
from trainer.core.errors import UserError
from trainer.sweeps import decide
from trainer.sweeps.advance import custom_of, revised
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.records import ADAPTIVE, Spec, Trial
from trainer.sweeps.space import size, space_of


def extend(sweep: SweepDirectory, trials: int | None, changes: list[str]) -> int:
    """Add trials, and return how many. Those that the sweep has keep their numbers, points and results.

    Args:
        sweep: The sweep.
        trials: Number of trials to add.
        changes: Overrides with other values of parameters; of a grid, the points that are new are added.

    Raises:
        UserError: The sweep has no such parameter, or a point is invalid.
    """
    if trials is not None and trials < 1:
        raise UserError(f"--trials {trials}: nothing to add", "write --trials 10")
    before = sweep.spec()
    spec = _changed(sweep, before, changes) if changes else before
    custom = custom_of(sweep, spec)
    if spec.method == "grid":
        if not changes:
            raise UserError("a grid has no further points", "add values: trainer sweep extend SWEEP optimizer.lr=0.1,1")
        existing = [sweep.trial(number) for number in sweep.names()]
        new = decide.added(spec, existing, decide.planned(spec, 0, size(spec.parameters) or 0))
        total = len(existing) + len(new)
    elif spec.method in ADAPTIVE:
        new, total = [], before.trials + (trials or 0)
    else:
        new = decide.planned(spec, before.trials, trials or 0, custom)
        total = before.trials + len(new)
    _check(sweep, spec, new)
    if not sweep.write_spec(revised(before, parameters=spec.parameters, fixed=spec.fixed, trials=total)):
        raise UserError(
            "another command has changed this sweep just now", "see trainer sweep status, then repeat yours"
        )
    sweep.add_trials(new)
    return total - before.trials


def _changed(sweep: SweepDirectory, spec: Spec, changes: list[str]) -> Spec:
    """Return the spec with other values of its parameters."""
    found = swept(changes, config_dirs=[], cwd=sweep.path / spec.code)
    assert found is not None
    space = space_of(found[0], spec.seed)
    keys = [one.key for one in spec.parameters]
    wrong = [one.key for one in space.parameters if one.key not in keys] + space.fixed
    if wrong or space.control:
        shown = wrong[0] if wrong else f"sweep.{next(iter(space.control))}"
        raise UserError(f"{shown}: not a parameter of this sweep", f"its parameters: {', '.join(keys)}")
    new = {one.key: one for one in space.parameters}
    return replace(spec, parameters=[new.get(one.key, one) for one in spec.parameters])


def _check(sweep: SweepDirectory, spec: Spec, new: list[Trial]) -> None:
    """Compose the new points from what the sweep has frozen, and check their values."""
    from pathlib import Path

    from trainer.cli.job import check_one
    from trainer.cli.overrides import name_point
    from trainer.core.errors import TrainerError

    loaded = Loaded()
    folders = [sweep.path / folder for folder in spec.config_dirs]
    for trial in new:
        try:
            one = compose(
                trial.overrides,
                config_dirs=folders,
                config_name=spec.config_name,
                cwd=sweep.path / spec.code,
                number=trial.number,
                loaded=loaded,
            )
            check_one(one, targets=False, fits=False, cwd=Path(spec.cwd), ask_cluster=lambda request: False)
        except TrainerError as error:
            raise name_point(error, trial.overrides, 2) from None
