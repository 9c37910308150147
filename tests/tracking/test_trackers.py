"""Trackers other than W&B: what they hold after three kills is what plain Lightning gives them in one go.

One module logs in every way that a user's may, to four trackers at once. The oracle runs it in a Trainer of Lightning's
own with the same loggers. The only difference allowed is the documented one: what `self.log` logs of a step has the
number of completed steps here, and one less in Lightning.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import TrainerCli

pytestmark = pytest.mark.skipif(
    not (find_spec("tensorboard") and find_spec("mlflow")), reason="no tensorboard, or no mlflow"
)
HAS_TRACKIO = find_spec("trackio") is not None
PROJECT = '''
import os
import signal
import sys

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

KILLS = (3, 13, 14)


class KillAt(Callback):
    """SIGKILL to the first rank after these steps, once each."""

    def on_train_batch_end(self, trainer, *arguments):
        attempt = int(os.environ["TRAINER_ATTEMPT"]) + int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if attempt < len(KILLS) and trainer.global_step == KILLS[attempt] and trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(80, 4)), batch_size=4)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4)


class Model(LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, width)

    def training_step(self, batch, batch_idx):
        step = self.global_step
        self.log("by_self", float(step))
        self.log_dict({"even": 2.0 * step, "odd": 2.0 * step + 1})
        for logger in self.loggers:
            logger.log_metrics({"by_logger": 3.0 * step, "a tensor": torch.tensor(0.5)}, step=step)
            logger.log_metrics({"by_samples": 4.0 * step}, step=1000 * (step + 1))
            kind = type(logger).__name__
            if kind == "TensorBoardLogger":
                logger.experiment.add_scalar("raw", 5.0 * step, global_step=10000 * (step + 1))
                logger.experiment.add_text("words", f"step {step}", global_step=step)
                logger.experiment.add_scalars("pair", {"one": step, "two": -step}, step)
                logger.experiment.add_histogram("weights", torch.arange(4.0), step)
            elif kind == "MLFlowLogger":
                logger.experiment.set_tag(logger.run_id, "last", str(step))
            elif kind == "TrackioLogger":
                logger.experiment.log({"raw": 5.0 * step}, step=10000 * (step + 1))
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.global_step), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def plain(folder):
    """The same training and the same trackers, by Lightning alone."""
    from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

    loggers = [
        TensorBoardLogger(folder, name="tensorboard"),
        CSVLogger(folder, name="csv"),
        MLFlowLogger("trainer", tracking_uri=f"file:{folder}/mlruns"),
    ]
    if "trackio" in sys.argv:
        from trainer.tracking.trackio_logger import TrackioLogger

        loggers.append(TrackioLogger("plain", "plain"))
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=loggers, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_train_batches=10,
    )
    trainer.fit(Model(), datamodule=Data())

'''
JOB = [
    "model._target_=project.Model",
    "data._target_=project.Data",
    "+callbacks.killer._target_=project.KillAt",
    f"tracking=[tensorboard,csv,mlflow{',trackio' if HAS_TRACKIO else ''}]",
    "resources.cpu_processes=2",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=5",
    "resilience.max_restarts=9",
]
OURS = {"train/loss", "train/lr", "train/samples_per_s", "epoch"}
"""Logged by the trainer in addition."""
SHIFTED = {"by_self", "even", "odd", "val_loss"}
Curves = dict[str, list[tuple[int, float]]]


def tensorboard_curves(folder: Path) -> tuple[Curves, list[str]]:
    """Scalars by tag as each file has them, in the order of the files, and the texts; no reader has hidden anything."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    curves: Curves = {}
    texts = []
    for path in sorted(folder.rglob("events.out.*")):
        below = str(path.parent.relative_to(folder))
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                plugin = value.metadata.plugin_data.plugin_name
                tag = value.tag if below == "." else f"{below}/{value.tag}"
                if plugin == "text":
                    texts.append(f"{event.step}: {make_ndarray(value.tensor).item().decode()}")
                elif plugin in ("scalars", "histograms"):
                    number = float(make_ndarray(value.tensor)) if plugin == "scalars" else 0.0
                    curves.setdefault(tag, []).append((event.step, number))
    return curves, texts


def csv_curves(path: Path) -> Curves:
    curves: Curves = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def mlflow_curves(store: Path) -> tuple[Curves, dict[str, str], dict[str, str], str]:
    """The only run's curves in the order of logging, its tags, its parameters and its status."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{store}")
    (experiment,) = client.search_experiments(filter_string="name = 'trainer'")
    (run,) = client.search_runs([experiment.experiment_id])
    names = run.data.metrics
    curves = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in names
    }
    return curves, run.data.tags, run.data.params, run.info.status


def trackio_curves(folder: Path, project: str, name: str) -> Curves:
    """Read in a process of its own, because the database's folder is a variable that the import reads."""
    code = f"""
import json
from trackio.sqlite_storage import SQLiteStorage
names = [record["name"] for record in SQLiteStorage.get_run_records({project!r})]
print(json.dumps([names, SQLiteStorage.get_logs({project!r}, {name!r})]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRACKIO_DIR": str(folder)}, capture_output=True, text=True
    )
    names, rows = json.loads(done.stdout.splitlines()[-1])
    assert names == [name]
    curves: Curves = {}
    for row in rows:
        for key in row.keys() - {"step", "timestamp"}:
            curves.setdefault(key, []).append((row["step"], row[key]))
    return curves


def expected_of(plain: Curves) -> Curves:
    return {
        name: [(step + 1, value) for step, value in points] if name in SHIFTED else points
        for name, points in plain.items()
        if name not in OURS
    }


def of_user(curves: Curves) -> Curves:
    return {name: points for name, points in curves.items() if name not in OURS}


def check_monotone(curves: Curves) -> None:
    for name, points in curves.items():
        steps = [step for step, _ in points]
        # Lightning logs the epoch with each call, several times a step.
        assert steps == sorted(steps if name == "epoch" else set(steps)), name


@pytest.fixture
def project(workdir: Path) -> Path:
    (workdir / "project.py").write_text(PROJECT)
    return workdir


def test_three_kills_and_four_trackers(trainer_cli: TrainerCli, project: Path) -> None:
    database = project / "trackio"
    variables = {"TRACKIO_DIR": str(database), "MLFLOW_ALLOW_FILE_STORE": "true"}
    program = "import sys, lightning, project; project.plain(sys.argv[1])"
    arguments = [sys.executable, "-c", program, str(project / "plain"), *(["trackio"] if HAS_TRACKIO else [])]
    oracle = subprocess.Popen(
        arguments, cwd=project, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    done = trainer_cli("fit", *JOB, env=variables, timeout=300)
    said, _ = oracle.communicate(timeout=120)
    assert oracle.returncode == 0, said.decode()
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (project / "runs").iterdir()
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in starts if event["event"] == "started"] == [0, 0, 10, 10]

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == list(range(31))  # 0: what the module logs before the first step is done

    plain, plain_texts = tensorboard_curves(project / "plain" / "tensorboard" / "version_0")
    ours, texts = tensorboard_curves(run / "tensorboard" / "version_0")
    assert of_user(ours) == expected_of(plain)
    assert texts == plain_texts
    check_monotone(ours)

    ours = csv_curves(run / "csv" / "version_0" / "metrics.csv")
    assert of_user(ours) == expected_of(csv_curves(project / "plain" / "csv" / "version_0" / "metrics.csv"))
    check_monotone(ours)

    plain, _, plain_parameters, _ = mlflow_curves(project / "plain" / "mlruns")
    ours, tags, parameters, status = mlflow_curves(run / "mlruns")
    assert of_user(ours) == expected_of(plain)
    assert (tags["mlflow.runName"], tags["last"], status) == (run.name, "29", "FINISHED")
    assert parameters["width"] == plain_parameters["width"] == "3"
    assert parameters["config/trainer/max_epochs"] == "3"
    check_monotone(ours)

    if HAS_TRACKIO:
        ours = trackio_curves(database, "trainer", run.name)
        expected = expected_of(trackio_curves(database, "plain", "plain"))
        once = of_user(ours)
        # What a module writes by `experiment` itself, nobody filters: the steps after a checkpoint are there twice.
        assert Counter(set(once.pop("raw"))) == Counter(expected.pop("raw"))
        assert once == expected
        check_monotone({name: points for name, points in ours.items() if name != "raw"})
    # Row for row the trainer's own metrics.
    for name in ("train/loss", "val_loss"):
        rows = [(line["step"], line[name]) for line in lines if name in line]
        assert [(step, pytest.approx(value)) for step, value in rows] == csv_curves(
            run / "csv" / "version_0" / "metrics.csv"
        )[name]
