"""Make or resume the run of a claimed trial, from the code and the configs that the sweep has frozen."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.cli.job import check_one, freeze_shape
from trainer.config.compose import compose, frozen_hydra
from trainer.config.instantiate import freeze
from trainer.core.errors import EnvironmentFault
from trainer.core.files import read_json, write_atomic
from trainer.runs import events, trust
from trainer.runs.directory import RunDirectory, new_identity
from trainer.supervise.variables import FOLLOWER_VARIABLE, NODES_VARIABLE, PEERS_VARIABLE, RENDEZVOUS_VARIABLE
from trainer.sweeps.advance import Claim
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.records import Spec, TrialRun
from trainer.tracking.client_settings import record_environment


def begin(sweep: SweepDirectory, claim: Claim) -> RunDirectory:
    """Return the run of a claimed trial, ready to be launched by this process.

    Raises:
        UserError: The point cannot be trained.
        EnvironmentFault: The run cannot be written.
    """
    run = claim.previous
    if run is not None:
        trust.require(run, run.launch().trusted)
        sweep.add_run(claim.trial.number, claim.owner, TrialRun(path=str(run.path), first_attempt=run.next_attempt()))
        run.stop_request.unlink(missing_ok=True)
        run.add_event(events.Resumed())
        return run
    return _make(sweep, claim)


def _make(sweep: SweepDirectory, claim: Claim) -> RunDirectory:
    spec, trial = claim.spec, claim.trial
    composed = compose(
        trial.overrides,
        config_dirs=[sweep.path / folder for folder in spec.config_dirs],
        config_name=spec.config_name,
        cwd=sweep.path / spec.code,
        number=trial.number,
    )
    # The targets were checked when the code was frozen, and the cluster has accepted the sweep.
    shape, _ = check_one(composed, targets=False, fits=False, cwd=Path(spec.cwd), ask_cluster=lambda request: False)
    config = composed.config
    freeze_shape(config, shape)
    if config["tracking"].get("group") is None and "group" in config["tracking"]:
        config["tracking"]["group"] = sweep.path.name
    hydra = frozen_hydra(composed)
    runs_dir, name, identity = Path(spec.runs_dir), config["name"], new_identity()
    planned = RunDirectory(runs_dir / f"{name}-{identity}")
    sweep.add_run(trial.number, claim.owner, TrialRun(path=str(planned.path), first_attempt=0))
    run = RunDirectory.new(runs_dir, name, identity)
    config = hydra.keep(run.path, config, Path(spec.cwd))
    write_atomic(run.config_path, freeze(config))
    write_atomic(run.overrides_path, shlex.join(trial.overrides) + "\n")
    _copy_code(sweep, run)
    choices = {group: option for group, option in composed.choices.items() if option is not None}
    write_atomic(run.manifest_path, json.dumps(_manifest(sweep, trial.number, run, choices), indent=1))
    run.add_event(events.Created(overrides=trial.overrides))
    record_environment(run, config["tracking"])
    run.write_launch(replace(run.launch(), cwd=spec.cwd, shape=shape, trusted=trust.why_untrusted(run) is not None))
    return run


def _copy_code(sweep: SweepDirectory, run: RunDirectory) -> None:
    try:
        for name in ("code", "imports"):
            if (sweep.path / name).is_dir():
                shutil.copytree(sweep.path / name, run.path / name, symlinks=True)
        if (sweep.path / "code.diff").is_file():
            shutil.copyfile(sweep.path / "code.diff", run.path / "code.diff")
    except (OSError, shutil.Error) as error:
        raise EnvironmentFault(
            f"the code of the sweep cannot be copied: {error}", "free space, or see its mode"
        ) from None


def _manifest(sweep: SweepDirectory, number: int, run: RunDirectory, choices: dict[str, str]) -> dict[str, Any]:
    from trainer.runs.manifest import environment

    frozen: dict[str, Any] = read_json(sweep.manifest_path, {})
    here = environment()
    return {
        **frozen,
        **{key: here[key] for key in ("host", "gpus", "machine")},
        "id": run.id,
        "choices": choices,
        "sweep": {"id": sweep.id, "name": sweep.path.name, "path": str(sweep.path), "trial": number},
    }


_OF_A_RUN = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "TRAINER_ATTEMPT"),
    *(FOLLOWER_VARIABLE, NODES_VARIABLE, RENDEZVOUS_VARIABLE, PEERS_VARIABLE),
}


def clear_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables of a process that trains a trial, without those of an enclosing run or job."""
    return {**{key: value for key, value in environment.items() if key not in _OF_A_RUN}, "PYTHONSAFEPATH": "1"}


def home(spec: Spec) -> None:
    """Change into the working directory of the trials, to which relative paths refer.

    Raises:
        EnvironmentFault: It is gone.
    """
    try:
        os.chdir(spec.cwd)
    except OSError as error:
        raise EnvironmentFault(
            f"{spec.cwd}: {error.strerror}", "restore the folder from which the sweep was started"
        ) from None
