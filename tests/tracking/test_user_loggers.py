"""The user's own loggers over several attempts; rank 1 is asked beside rank 0, in this one process."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from trainer.config.loggers import problems_of_loggers, settle_loggers
from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.events import LoggerFailed, LoggerVersions
from trainer.tracking import user_loggers

CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "csv"}
WANDB = {"_target_": "lightning.pytorch.loggers.wandb.WandbLogger"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "runs" / "digits-abcd1234")
    directory.path.mkdir(parents=True)
    return directory


@pytest.fixture
def rank_one() -> Iterator[None]:
    before = rank_zero_only.rank
    rank_zero_only.rank = 1
    yield
    rank_zero_only.rank = before


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def attempt(run: RunDirectory, folder: Path, resumed_at: int, until: int) -> CSVLogger:
    (logger,) = user_loggers.build({"csv": {**CSV, "save_dir": str(folder)}}, run, resumed_at, True, None)
    for step in range(resumed_at + 1, until + 1):
        logger.log_metrics({"loss": float(step)}, step=step)
    logger.save()
    assert isinstance(logger, CSVLogger)
    return logger


def test_a_resumed_csv_file_continues_with_each_step_once(run: RunDirectory, tmp_path: Path) -> None:
    """In a folder of several runs, where Lightning makes a version for each process that trains."""
    (tmp_path / "logs" / "csv" / "version_0").mkdir(parents=True)
    first = attempt(run, tmp_path / "logs", 0, 5)
    (tmp_path / "logs" / "csv" / "version_2").mkdir()  # somebody else's, since
    second = attempt(run, tmp_path / "logs", 3, 6)
    assert first.version == second.version == 1
    assert rows(Path(second.log_dir, "metrics.csv")) == [(str(step), f"{step}.0") for step in range(1, 7)]


def test_other_ranks_have_the_version_of_the_first(run: RunDirectory, rank_one: None) -> None:
    run.add_event(LoggerVersions(versions={"csv": 4}))
    (logger,) = user_loggers.build({"csv": CSV, "off": None}, run, 0, False, None)
    logger.experiment.log_metrics({"a": 1.0})  # type: ignore[attr-defined]  # nothing happens
    assert logger.save_dir == str(run.path)
    assert not (run.path / "csv").exists()


def test_tensorboard_hides_what_is_logged_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keyword is SummaryWriter's, which need not be installed to see what it would be given."""
    from lightning.pytorch.loggers import TensorBoardLogger

    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    node = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": "tensorboard"}
    logger = user_loggers._make("tensorboard", node, run, 2, 30)
    assert isinstance(logger, TensorBoardLogger)
    assert (logger.version, logger._kwargs) == (2, {"purge_step": 31})
    new = user_loggers._make("tensorboard", node, run, None, 0)
    assert isinstance(new, TensorBoardLogger)
    assert new._kwargs == {}


def test_steps_are_put_on_the_axis(run: RunDirectory) -> None:
    (logger,) = user_loggers.build({"csv": CSV}, run, 0, True, None)
    user_loggers.at_steps(logger, lambda given: 10 if given == 9 else given or 0)
    logger.log_metrics({"loss": 1.0}, step=9)
    logger.log_metrics({"loss": 2.0}, step=3)
    logger.save()
    assert rows(run.path / "csv" / "version_0" / "metrics.csv") == [("10", "1.0"), ("3", "2.0")]


def settled(logger: dict[str, Any], **tracking: Any) -> dict[str, Any]:
    config = {"logger": logger, "tracking": {"name": "wandb", "mode": "auto", **tracking}}
    settle_loggers(config)
    return config


def test_a_wandb_logger_becomes_the_section_tracking() -> None:
    template = {  # as widely used project templates have it
        **WANDB,
        "save_dir": "/logs",
        "offline": False,
        "id": None,
        "anonymous": None,
        "project": "theirs",
        "log_model": False,
        "prefix": "",
        "group": "",
        "tags": ["a"],
        "job_type": "train",
        "name": "first",
    }
    config = settled({"csv": CSV, "wandb": template}, project="mine")
    assert config["logger"] == {"csv": CSV}
    assert config["tracking"] == {
        **{"name": "wandb", "mode": "auto", "project": "mine"},  # an option of ours that is set stays
        **{"tags": ["a"], "job_type": "train", "run_name": "first", "dir": "/logs"},
    }
    assert settled({"wandb": {**WANDB, "offline": True}})["tracking"]["mode"] == "offline"
    twin = {"_target_": "pytorch_lightning.loggers.WandbLogger", "project": "p"}
    assert settled(twin) == {"logger": {}, "tracking": {"name": "wandb", "mode": "auto", "project": "p"}}
    assert list(settled(CSV)["logger"]) == ["CSVLogger"]


@pytest.mark.parametrize(("name", "value"), [("log_model", "all"), ("id", "abc"), ("prefix", "x"), ("save_code", True)])
def test_what_cannot_be_moved_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"logger\.wandb\.{name}={value}"):
        settled({"wandb": {**WANDB, name: value}})


@pytest.mark.parametrize(
    ("target", "fix"),
    [
        ("lightning.pytorch.loggers.TensorBoardLogger", "pip install 'tensorboard>="),
        ("lightning.pytorch.loggers.MLFlowLogger", "pip install 'mlflow-skinny>="),
        ("trainer.tracking.trackio_logger.TrackioLogger", "pip install 'trackio>="),
        ("lightning.pytorch.loggers.CometLogger", "pip install comet_ml"),
    ],
)
@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, target: str, fix: str, cluster: str
) -> None:
    monkeypatch.setattr("trainer.config.loggers.find_spec", lambda name: None)
    config = {"logger": {"csv": CSV, "mine": {"_target_": target}}, "cluster": {"name": cluster}}
    (problem,) = problems_of_loggers(config)
    assert "logger.mine needs the package" in problem.message
    assert problem.fix.startswith(fix)
    assert not list(problems_of_loggers({**config, "cluster": {"name": cluster, "container": "image.sif"}}))


def test_a_server_that_does_not_answer_leaves_the_training_alone(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the other loggers; every rank leaves out the same one, and a later attempt tries again."""
    pytest.importorskip("mlflow")
    (run.path / "config.yaml").write_text("tracking: {finish_timeout_s: 1}\n")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow = {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "http://127.0.0.1:9"}
    (logger,) = user_loggers.build({"mlflow": mlflow, "csv": CSV}, run, 0, True, None)
    assert isinstance(logger, CSVLogger)
    (event,) = run.events_of(LoggerFailed)
    assert event.logger == "mlflow"
    assert "training without it" in capfd.readouterr().out
    (versions,) = run.events_of(LoggerVersions)
    assert versions.versions == {"csv": 0}


class Rewinds(Logger):
    """A logger of a user's own that can be rewound."""

    rewound: ClassVar[list[int]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *arguments: Any, **named: Any) -> None: ...

    name = "rewinds"
    version = None

    def rewind(self, step: int) -> None:
        self.rewound.append(step)


def test_a_logger_that_can_rewind_is_told_where_a_later_attempt_begins(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_loggers, "locate", lambda path, where: Rewinds)
    monkeypatch.setattr(user_loggers, "instantiate", lambda arguments, where: Rewinds())
    for step in (0, 7):
        user_loggers.build({"mine": {"_target_": "x.Rewinds"}}, run, step, True, None)
    assert Rewinds.rewound == [7]


def test_secrets_among_hyperparameters_are_masked(run: RunDirectory) -> None:
    (logger,) = user_loggers.build({"csv": CSV}, run, 0, True, None)
    user_loggers.at_steps(logger, lambda given: given or 0)
    logger.log_hyperparams({"api_key": "abc", "lr": 1})
    logger.log_hyperparams(Namespace(password="abc"))
    logger.save()
    hparams = (run.path / "csv" / "version_0" / "hparams.yaml").read_text()
    assert hparams == "api_key: '***'\nlr: 1\npassword: '***'\n"
