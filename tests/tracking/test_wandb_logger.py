"""`self.logger` where W&B is the logger: what Lightning's WandbLogger does, with the steps of the run as x axis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.wandb_server import WandbServer
from tests.train import in_process
from trainer.runs.events import BadStepEvent, Hang, Notified, Straggler

MODULE = """
import torch
from lightning.pytorch import LightningModule


class Model(LightningModule):
    def __init__(self, lr: float = 0.01, api_key: str = "hidden"):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, 1)

    def on_train_start(self):
        self.logger.watch(self.net, log="gradients", log_freq=2)
        self.logger.log_hyperparams({"found": 3})
        self.logger.experiment.config.update({"by_hand": 4})
        assert self.logger.save_dir == self.trainer.log_dir == self.trainer.default_root_dir
        assert self.logger.name == self.logger.experiment.project
        assert self.logger.version == self.logger.experiment.id

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean())
        self.logger.experiment.log({"direct": 1.0})

    def on_validation_end(self):
        if not self.logger.experiment.url:  # a table is an artifact, of which the stand-in server knows nothing
            self.logger.log_text(key="texts", columns=["text"], data=[["hello"]])
        self.logger.log_metrics({"by_method": 2.0}, step=self.global_step)

    def on_train_epoch_end(self):
        self.log("step", 100.0 + self.current_epoch)  # epochs as the x axis, as users of Lightning have it
        self.log("by_epoch", 5.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
"""
DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.arange(64.0).view(16, 4) / 64, batch_size=4)

    val_dataloader = train_dataloader
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # the worker sets them
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    name = f"wandb_project_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(DATA + MODULE)
    for group, target in (("model", "Model"), ("data", "Data")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(f"_target_: {name}.{target}\n")
    yield tmp_path
    import wandb

    wandb.teardown()


JOB = ["model=mine", "data=mine", "tracking=wandb", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"]


@pytest.mark.filterwarnings("ignore")
def test_what_reaches_the_server(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        for name, value in {**server.environment(), "WANDB_PROJECT": "theirs"}.items():
            monkeypatch.setenv(name, value)
        run, _ = in_process.fit(project, *JOB)
        assert server.unknown == []
        (served,) = server.runs.values()
    assert (served.id, served.project, served.exit_code) == (run.id, "theirs", 0)
    config = served.config
    assert {"lr": config["lr"], "found": config["found"], "by_hand": config["by_hand"]} == {
        "lr": 0.01,
        "found": 3,
        "by_hand": 4,
    }
    assert config["api_key"] == "***"
    assert config["trainer"]["max_epochs"] == 2
    steps = {}
    for row in served.history:
        for name in row:
            steps.setdefault(name, []).append(row.get("trainer/global_step"))
    assert steps["train_loss"] == list(range(1, 9))
    assert steps["val_loss"] == steps["by_method"] == [4, 8]
    assert steps["by_epoch"] == [100, 101]
    assert "direct" in steps
    assert any(name.startswith("gradients/") for name in steps)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variables", [{"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}])
def test_the_same_module_where_nothing_is_sent(
    project: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer() as server:
        for name, value in {**server.environment(), **variables}.items():
            monkeypatch.setenv(name, value)
        run, _ = in_process.fit(project, *JOB)
        assert not server.requests
    assert len(list(run.wandb_dir.glob("offline-run-*"))) == (variables["WANDB_MODE"] == "offline")


@pytest.mark.filterwarnings("ignore")
def test_artifacts_histograms_and_an_alert(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["tracking.code=true", "tracking.artifacts=all", "tracking.watch=all", "tracking.watch_every_n_steps=4"]
    saves = ["checkpoint.every_n_steps=3", "checkpoint.keep_last=1", "checkpoint.monitor=val_loss"]
    with WandbServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        run, _ = in_process.fit(project, *JOB, *asked, *saves)
        assert server.unknown == []
        (served,) = server.runs.values()
        (code,) = server.named("code")
        models = server.named("model")
    module = f"code/{project.name and next(project.glob('*.py')).name}"
    assert code.files[module].decode() == (run.path / module).read_text()
    steps = [model.metadata["step"] for model in models]
    assert steps == sorted(steps)
    assert {3, 6, 8} <= set(steps)  # those that were deleted since are there, too
    assert all(f"step-{model.metadata['step']}" in model.aliases for model in models)
    assert all("latest" in model.aliases for model in models)
    best = [model for model in models if "best" in model.aliases]
    assert best
    last = models[-1]
    folder = run.checkpoints_dir / f"step-{steps[-1]:08d}"
    assert set(last.manifest["contents"]) == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    }
    assert sum(map(len, last.files.values())) == sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file()
    )
    for name in ("gradients/net.weight", "parameters/net.bias"):
        rows = {row["trainer/global_step"]: row[name] for row in served.history if name in row}
        assert list(rows) == [0, 4]
        assert all(sum(row["values"]) == (4 if "weight" in name else 1) for row in rows.values())
    assert not server.alerts


@pytest.mark.filterwarnings("ignore")
def test_every_trouble_sends_an_alert_if_asked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = project.glob("wandb_project_*.py")
    module.write_text(
        module.read_text().replace("loss = self.net", "assert batch_idx < 2, 'no more'\n        loss = self.net")
    )
    with WandbServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        run = in_process.new_run(project, [*JOB, "tracking.alerts=true"])
        # What the supervisor wrote of the attempt before, whose ranks could not tell anybody.
        run.add_event(Hang(attempt=0, step=1, still_s=60, reason="rank 1 on node1 does not enter all_reduce"))
        run.add_event(Straggler(attempt=0, rank=1, host="node1", reason="its data takes 2 s"))
        for step in (1, 2):
            run.add_event(BadStepEvent(event="not_finite", step=step, reason="the loss is NaN", action="skipped"))
        in_process.attempt(run, project, outcome="failed")
        (served,) = server.runs.values()
        assert server.unknown == []
    assert served.exit_code == 1
    name = run.path.name
    told = [(alert["title"].removeprefix(f"{name} "), alert["severity"], alert["text"]) for alert in server.alerts]
    assert told[:3] == [
        ("hangs at step 1", "ERROR", "rank 1 on node1 does not enter all_reduce"),
        ("waits for rank 1 on node1", "WARN", "its data takes 2 s"),
        ("loss or gradient not finite at step 2: skipped", "WARN", "the loss is NaN"),
    ]
    assert [title for title, _, _ in told[3:]] == ["failed"]
    assert "AssertionError: no more" in told[3][2]
    assert [event.about for event in run.events_of(Notified)] == ["wandb:hang", "wandb:straggler", "wandb:nan"]
