"""What users' modules ask of loggers, and Lightning's callbacks of a run, on two ranks of which one is killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import TrainerCli
from tests.test_resume import KILLER, kill_at

PROJECT = '''
import json

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


def rows(count):
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 4, generator=generator))


def size_of(batch):
    return len(batch[0])


class Said(Callback):
    def on_validation_end(self, trainer, pl_module):
        print("from configure_callbacks", flush=True)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(rows(64), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows(32), batch_size=4)


class Model(LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))

    def configure_callbacks(self):
        return [Said()]

    def on_train_start(self):
        trainer = self.trainer
        self.use(self.logger)
        for logger in self.loggers:
            logger.experiment, logger.name, logger.version, logger.save_dir
        found = {
            "logger": type(self.logger).__name__,
            "version": self.logger.version,
            "log_dir": trainer.log_dir,
            "root": trainer.default_root_dir,
            "same": trainer.logger is self.logger is self.loggers[0] is trainer.loggers[0],
            "checkpoint": [type(one).__name__ for one in trainer.checkpoint_callbacks],
            "monitor": trainer.checkpoint_callback.monitor,
            "stopping": type(trainer.early_stopping_callback).__name__,
            "bar": type(trainer.progress_bar_callback).__name__,
            "last": [type(one).__name__ for one in trainer.callbacks[-3:]],
            "bar_metrics": sorted(trainer.progress_bar_metrics),
        }
        print("FOUND " + json.dumps(found), flush=True)

    def use(self, logger):
        """Without a guard, on every rank: Lightning gives a dummy where there is nothing to write to."""
        logger.log_metrics({"by_hand": 1.0}, step=self.global_step)
        logger.log_hyperparams({"more": 2})
        logger.log_graph(self)
        logger.save()

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
'''

LIGHTNING = "lightning.pytorch.callbacks"
CALLBACKS = [
    f"callbacks.best={{_target_: {LIGHTNING}.ModelCheckpoint, dirpath: kept, monitor: val_loss, save_top_k: 2, "
    "filename: 'at-{step}', save_last: true}",
    f"callbacks.stop={{_target_: {LIGHTNING}.EarlyStopping, monitor: val_loss, patience: 9}}",
    f"callbacks.lr={{_target_: {LIGHTNING}.LearningRateMonitor, logging_interval: step}}",
    f"callbacks.device={{_target_: {LIGHTNING}.DeviceStatsMonitor, cpu_stats: true}}",
    f"callbacks.rate={{_target_: {LIGHTNING}.ThroughputMonitor, window_size: 4, "
    "batch_size_fn: {_target_: project.size_of, _partial_: true}}",
    f"callbacks.summary={{_target_: {LIGHTNING}.ModelSummary}}",
    f"callbacks.bar={{_target_: {LIGHTNING}.TQDMProgressBar}}",
    f"callbacks.timer={{_target_: {LIGHTNING}.Timer, duration: '00:01:00:00'}}",
    f"callbacks.failed={{_target_: {LIGHTNING}.OnExceptionCheckpoint, dirpath: kept}}",
]
JOB = [
    "model=mine",
    "data=mine",
    "logger=csv",
    "tracking=none",
    "resources.cpu_processes=2",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=2",
    "checkpoint.every_n_steps=5",
]


@pytest.fixture
def project(workdir: Path) -> Path:
    (workdir / "project.py").write_text(PROJECT)
    (workdir / "killer.py").write_text(KILLER)
    for group, target in (("model", "project.Model"), ("data", "project.Data")):
        (workdir / "conf" / group).mkdir(parents=True)
        (workdir / "conf" / group / "mine.yaml").write_text(f"_target_: {target}\n")
    return workdir


def found_by_ranks(run: Path, attempt: int) -> list[dict[str, Any]]:
    logs = sorted((run / "logs" / f"attempt-{attempt:02d}").glob("rank-*.log"))
    lines = [[line for line in log.read_text().splitlines() if line.startswith("FOUND ")] for log in logs]
    return [json.loads(one[0].removeprefix("FOUND ")) for one in lines]


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*callbacks used to create.*", "ignore:.*srun.*")
@pytest.mark.filterwarnings(
    "ignore:.*Please add the following callbacks.*", "ignore:.*exists and is not empty.*", "ignore:.*LeafSpec.*"
)
def test_loggers_and_callbacks_beside_ours(trainer_cli: TrainerCli, project: Path) -> None:
    done = trainer_cli("fit", *JOB, *CALLBACKS, *kill_at(12, [1]), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (project / "runs").iterdir()
    for attempt in (0, 1):
        first, second = found_by_ranks(run, attempt)
        assert first == second
        assert first == {
            "logger": "CSVLogger",
            "version": 0,
            "log_dir": str(run / "csv" / "version_0"),
            "root": str(run),
            "same": True,
            "checkpoint": ["ModelCheckpoint", "OnExceptionCheckpoint"],
            "monitor": "val_loss",
            "stopping": "EarlyStopping",
            "bar": "TQDMProgressBar",
            # Ours see the state that all others have at the end of a step.
            "last": ["OnExceptionCheckpoint", "StepClock", "Boundary"],
            "bar_metrics": first["bar_metrics"],
        }
    _check_curves(run)
    log = (run / "logs" / "attempt-01" / "rank-0.log").read_text()
    assert "from configure_callbacks" in log
    assert "it/s" not in log  # no bar is drawn into the log
    _check_lightnings_files(project)


def _check_curves(run: Path) -> None:
    """The CSV file has the steps of metrics.jsonl, each once, over both attempts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"lr-SGD", "train_loss", "val_loss"} <= {name for line in lines for name in line}
    # What callbacks log at the end of a step is that step's; Lightning calls them before what counts it here.
    ends = [line["step"] for line in lines if "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in line]
    assert ends == [line["step"] for line in lines if "train/batches" in line] == list(range(2, 17, 2))
    assert "train/device/samples_per_sec" in lines[-1]
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "val_loss"):
        steps = [int(row["step"]) for row in rows if row[name]]
        assert steps == [line["step"] for line in lines if name in line]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [8, 16]
    assert "more: 2" in (run / "csv" / "version_0" / "hparams.yaml").read_text()


class Plain(LightningModule):
    """The project's module, for a process that has plain Lightning only."""

    def __init__(self, width: int = 1, lr: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _check_lightnings_files(project: Path) -> None:
    assert sorted(path.name for path in (project / "kept").iterdir()) == [
        "at-step=16.ckpt",
        "at-step=8.ckpt",
        "last.ckpt",
    ]
    path = project / "kept" / "at-step=16.ckpt"
    loaded = Plain.load_from_checkpoint(path)
    assert loaded.hparams == {"width": 8, "lr": 0.01}
    state = torch.load(path)
    assert (state["global_step"], state["epoch"]) == (16, 1)
    assert not [key for key in state["callbacks"] if key in ("RngState", "Boundary", "BestMetric")]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=project,
    )
    loader = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4)
    trainer.fit(loaded, loader, ckpt_path=str(path))
    assert trainer.global_step == 16 + 8
