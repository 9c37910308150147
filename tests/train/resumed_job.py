"""Trains jobs with the worker's own code, many in one process, each also killed and resumed; as a script all of them.

`python resumed_job.py FOLDER` writes FOLDER/NAME.json for each: what differed, in words (an empty list is right), or
which checkpoint is best.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from tests.train import resumed_modules
from trainer.checkpoint.store import CheckpointStore
from trainer.cli.chosen import choose
from trainer.config.compose import Loaded, compose
from trainer.config.instantiate import freeze, instantiate
from trainer.faultbench.compare import first_difference
from trainer.faultbench.diagnosis import diagnose
from trainer.faultbench.trace import ResumeTrace
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Started
from trainer.runs.summary import summary
from trainer.train import run as worker

MODULES = resumed_modules.__name__
CALLBACKS = "lightning.pytorch.callbacks"
RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TRAINER_ATTEMPT": "0"}
JOB = [
    "tracking=none",
    "resources.cpu_processes=1",
    "resources.gpus=0",
    "strategy=single",
    "scheduler=constant",
    "name=job",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=1",
    "checkpoint.every_minutes=null",
    "checkpoint.keep_last=100",
    "checkpoint.asynchronous=false",
    "callbacks=sample_log",
    f"+callbacks.crash._target_={MODULES}.Crash",
]


def callback(target: str, **arguments: Any) -> list[str]:
    given = [f"+callbacks.tried.{name}={value}" for name, value in arguments.items()]
    return [f"+callbacks.tried._target_={target}", *given]


LIGHTNINGS_LOOP = ["trainer.lean_loop=false"]
CASES: dict[str, tuple[str, list[str]]] = {
    "plain": ("Plain", []),
    "dropout": ("Dropout", []),
    "dropout_lightnings_loop": ("Dropout", LIGHTNINGS_LOOP),
    "max_steps_in_mid_epoch": ("Dropout", ["trainer.max_steps=10"]),
    "accumulation": ("Dropout", ["+data.batch_size=16", "+data.micro_batch=8"]),
    "plateau_by_epoch": ("PlateauByEpoch", []),
    "plateau_by_epoch_lightnings_loop": ("PlateauByEpoch", LIGHTNINGS_LOOP),
    "plateau_after_a_validation_in_mid_epoch": ("PlateauByEpoch", ["trainer.val_check_interval=3"]),
    "plateau_by_step": ("PlateauByStep", []),
    "plateau_of_the_epochs_mean": ("PlateauOfTheEpochsMean", []),
    "estimated_stepping_batches": ("Estimated", []),
    "schedulers_in_sequence": ("InSequence", []),
    "schedulers_by_epoch_and_step": ("ByEpochAndByStep", []),
    "hooks_of_the_module": ("HooksOfItsOwn", []),
    "hooks_of_the_module_lightnings_loop": ("HooksOfItsOwn", LIGHTNINGS_LOOP),
    "skipped_rest_of_an_epoch": ("SkipsTheRest", []),
    "skipped_rest_of_an_epoch_lightnings_loop": ("SkipsTheRest", LIGHTNINGS_LOOP),
    "two_optimizers": ("TwoOptimizers", []),
    "manual_accumulation": ("OneAccumulates", []),
    "metric_states": ("Measured", []),
    "pruning": ("WithoutNorm", callback(f"{CALLBACKS}.ModelPruning", pruning_fn="l1_unstructured", amount=0.3)),
    "pruning_to_the_winning_ticket": (
        "WithoutNorm",
        callback(
            f"{CALLBACKS}.ModelPruning",
            pruning_fn="l1_unstructured",
            amount=0.2,
            use_lottery_ticket_hypothesis="true",
            parameter_names="[weight]",
        ),
    ),
    "group_added_later": ("AddsAGroup", []),
    "logged_at_the_beginning": ("LogsOnce", []),
    "logged_at_the_beginning_lightnings_loop": ("LogsOnce", LIGHTNINGS_LOOP),
    "callback_state": ("Plain", callback(f"{MODULES}.Keeps")),
    "finetuning": ("Head", callback(f"{MODULES}.Thaw")),
    "early_stopping": ("Plain", callback(f"{CALLBACKS}.EarlyStopping", monitor="val_loss", patience=1)),
    "early_stopping_by_epoch": (
        "Plain",
        callback(f"{CALLBACKS}.EarlyStopping", monitor="train_loss_epoch", patience=1, check_on_train_epoch_end="true"),
    ),
    "averaging": ("Plain", callback(f"{CALLBACKS}.StochasticWeightAveraging", swa_lrs=0.05, swa_epoch_start=1)),
    "averaging_at_the_end": (
        "WithoutNorm",
        callback(f"{CALLBACKS}.StochasticWeightAveraging", swa_lrs=0.05, swa_epoch_start=1),
    ),
    "moving_average": ("Plain", callback(f"{CALLBACKS}.EMAWeightAveraging", decay=0.9)),
    "accumulation_scheduler": (
        "Plain",
        callback(f"{CALLBACKS}.GradientAccumulationScheduler", scheduling="{0:1,1:2}"),
    ),
    "learning_rate_finder": ("Plain", callback(f"{CALLBACKS}.LearningRateFinder", num_training_steps=15)),
}
UP_AND_DOWN = "[0.5,0.9,0.7]"
BEST: dict[str, tuple[str, str, list[str]]] = {
    "best_acc_named": ("Scores", "Data", [f"+model.scores={{val/acc: {UP_AND_DOWN}}}", "checkpoint.monitor=val/acc"]),
    "best_loss_named": (
        "Scores",
        "Data",
        [f"+model.scores={{val/loss: {UP_AND_DOWN}}}", "checkpoint.monitor=val/loss"],
    ),
    "best_mode_given": (
        "Scores",
        "Data",
        [f"+model.scores={{energy: {UP_AND_DOWN}}}", "checkpoint.monitor=energy", "checkpoint.mode=max"],
    ),
    "best_found": ("Scores", "Data", [f"+model.scores={{epochs: [1,2,3], val_loss: {UP_AND_DOWN}}}"]),
    "best_found_score": ("Scores", "Data", [f"+model.scores={{epochs: [1,2,3], val_f1: {UP_AND_DOWN}}}"]),
    "best_nan_first": ("Scores", "Data", ["+model.scores={val_loss: [nan,0.4,inf]}"]),
    "best_equal": ("Scores", "Data", ["+model.scores={val_loss: [0.4,0.4,0.4]}"]),
    "best_unknown": ("Scores", "Data", [f"+model.scores={{energy: {UP_AND_DOWN}}}"]),
    "best_no_direction": ("Scores", "Data", [f"+model.scores={{energy: {UP_AND_DOWN}}}", "checkpoint.monitor=energy"]),
    "best_not_logged": (
        "Scores",
        "Data",
        [f"+model.scores={{val_loss: {UP_AND_DOWN}}}", "checkpoint.monitor=val/loss"],
    ),
    "best_not_saved": ("Scores", "Data", [f"+model.scores={{val_acc: {UP_AND_DOWN}}}", "checkpoint.save_best=false"]),
    "best_rarely": (
        "Scores",
        "Data",
        ["+model.scores={val_acc: [0.5,0.6,0.7]}", "checkpoint.save_best_every_minutes=60"],
    ),
    "best_higher": ("HigherIsBetter", "Data", ["checkpoint.monitor=val_measure"]),
    "best_first_loader": ("OfSeveralLoaders", "SeveralLoaders", []),
    "best_of_training": ("Plain", "WithoutValidation", ["checkpoint.monitor=train_loss_epoch"]),
    "best_without_any": ("Plain", "WithoutValidation", []),
}
"""What says which checkpoint is best: module, data, options. Nothing else is saved before the end."""
CAUSES: dict[str, tuple[str, str, list[str]]] = {
    "cause_attribute": ("Counts", "Data", []),
    "cause_unstable": ("Unstable", "Data", []),
    "cause_weights": ("Drifts", "Data", []),
    "cause_options": ("Plain", "Data", callback(f"{MODULES}.ChangesTheRate")),
    "cause_data": ("Plain", "OwnOrder", []),
    "cause_none": ("Dropout", "Data", []),
}
"""What verify-resume is to find: module, data, options."""
CRASHES = ((1, -1), (4, 9))
"""In mid-epoch, then in the validation of epoch 1; before the first batch of an epoch, then late. Of two attempts that
resumed, each ends as the job that was not killed, whose curve and samples are compared from the first step on."""
WITHOUT_ORACLE = {
    "dropout",
    "dropout_lightnings_loop",
    "max_steps_in_mid_epoch",
    "accumulation",
    "learning_rate_finder",
}
"""Cases that draw random numbers, and those whose options Lightning is not given here."""


LOADED = Loaded()
"""The configuration files, which all jobs have in common."""


def config_of(home: Path, module: str, overrides: list[str], data: str = "Data") -> dict[str, Any]:
    for section in ("model", "data"):
        file = home / "conf" / section / "tried.yaml"
        if not file.exists():
            file.parent.mkdir(parents=True)
            file.write_text("_target_: null\n")
    targets = [f"model._target_={MODULES}.{module}", f"data._target_={MODULES}.{data}"]
    given = ["model=tried", "data=tried", *targets, *JOB, *overrides]
    return compose(given, config_dirs=[home / "conf"], cwd=home, loaded=LOADED).config


def train(path: Path, config: dict[str, Any], kills: tuple[int, ...] = ()) -> RunDirectory:
    """Train the job in `path` to its end, with a kill in each of its first attempts."""
    run = RunDirectory(path)
    for folder in (run.attempts_dir, run.live_dir, run.logs_dir, run.checkpoints_dir):
        folder.mkdir(parents=True, exist_ok=True)
    run.config_path.write_text(freeze(config))
    for attempt, kill in enumerate([*kills, None]):
        os.environ["TRAINER_ATTEMPT"] = str(attempt)
        resumed_modules.Crash.at = kill
        worker.run(path)
    return run


def oracle(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that plain Lightning ends with."""
    torch.manual_seed(0)
    module: Any = getattr(resumed_modules, config["model"]["_target_"].rpartition(".")[2])()
    tried = config["callbacks"].get("tried")
    interval = config["trainer"]["val_check_interval"]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[instantiate(tried, where="callbacks.tried")] if tried else [],
        val_check_interval=interval,
        check_val_every_n_epoch=None if interval else 1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=resumed_modules.Data())
    return module.state_dict()


def curve(run: RunDirectory) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time" and "_per_s" not in name} for line in lines]


def problems(home: Path, name: str) -> list[str]:
    module, overrides = CASES[name]
    config = config_of(home, module, overrides)
    unharmed = train(home / name / "unharmed", config)
    last = CheckpointStore(unharmed.checkpoints_dir).committed()[-1]
    found = []
    if name not in WITHOUT_ORACLE:
        saved = torch.load(last.path / "state.pt", weights_only=True)
        ours, theirs = saved.get("state_dict"), oracle(config)
        wrong = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        found += [f"not as Lightning: {', '.join(wrong[:3])}"] if wrong else []
    for kills in CRASHES:
        run = train(home / name / str(kills), config, kills)
        attempts = run.events_of(Started)
        if len(attempts) != len(kills) + 1 or not run.attempts():
            found.append(f"{kills}: {len(attempts)} attempts, ends {run.attempts()}")
            continue
        difference = first_difference(run.path, unharmed.path, last.step)
        if difference is None and name != "manual_accumulation" and curve(run) != curve(unharmed):
            difference = "another curve"
        found += [f"{kills}: {difference}"] if difference else []
    return found


def best(home: Path, module: str, data: str, overrides: list[str]) -> dict[str, Any]:
    """What the run says is best, what is on disk, and how it ended."""
    options = ["checkpoint.every_n_steps=null", "checkpoint.keep_last=1", *overrides]
    run = train(home / "run", config_of(home.parent, module, options, data))
    found = summary(run)
    return {
        "best": found["best"],
        "steps": [one["step"] for one in found["checkpoints"]],
        "chosen": choose(run, "best").step if found["checkpoints"] else None,
        "reason": run.attempts()[-1].reason,
        "exit_code": run.attempts()[-1].exit_code,
    }


def cause(home: Path, module: str, data: str, overrides: list[str]) -> dict[str, Any] | None:
    """What differs first in a job that is killed before batch 6, the third of epoch 1."""
    trace = f"+callbacks.trace._target_={ResumeTrace.__module__}.ResumeTrace"
    config = config_of(home.parent, module, [*overrides, trace], data)
    unharmed, killed = train(home / "unharmed", config), train(home / "killed", config, (6,))
    found = diagnose(killed, unharmed)
    return None if found is None else asdict(found)


def main() -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK)
    home = Path(sys.argv[1])
    for name in CASES:
        try:
            found = problems(home, name)
        except BaseException:
            found = [traceback.format_exc()]
        (home / f"{name}.json").write_text(json.dumps(found))
    for name, (module, data, overrides) in BEST.items():
        (home / f"{name}.json").write_text(json.dumps(best(home / name, module, data, overrides)))
    for name, (module, data, overrides) in CAUSES.items():
        (home / f"{name}.json").write_text(json.dumps(cause(home / name, module, data, overrides)))


if __name__ == "__main__":
    main()
