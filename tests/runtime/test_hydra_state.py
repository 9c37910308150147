"""A project in Hydra's style on one rank: its module gets DictConfigs, asks HydraConfig, instantiates its own parts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from tests.train.in_process import attempt, fit, new_run, weights, working_in
from trainer.checkpoint.store import CheckpointStore
from trainer.train.evaluate import evaluate

MODULE = """
import json, logging, os
import hydra, torch
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd, instantiate, to_absolute_path
from omegaconf import DictConfig, ListConfig

log = logging.getLogger(__name__)


class Data(pl.LightningDataModule):
    def __init__(self, sizes):
        super().__init__()
        assert type(sizes) is ListConfig
        self.sizes = sizes

    def train_dataloader(self):
        x = torch.randn(self.sizes[0], 4, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(x, batch_size=self.sizes[1])

    val_dataloader = train_dataloader


class Model(pl.LightningModule):
    def __init__(self, cfg, net, optimizer, out):
        super().__init__()
        self.save_hyperparameters()
        self.cfg, self.net = cfg, instantiate(net, bias=cfg.bias)
        job = HydraConfig.get()
        seen = {"types": [type(one).__name__ for one in (cfg, net, optimizer, cfg.widths)], "name": job.job.name}
        seen |= {"out": job.runtime.output_dir, "given": out, "model": job.runtime.choices.model}
        seen |= {"task": list(job.overrides.task), "mode": job.mode.name, "cwd": os.getcwd()}
        seen |= {"original": get_original_cwd(), "absolute": to_absolute_path("a")}
        print("SEEN", json.dumps(seen), flush=True)
        log.debug("a detail")

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).pow(2).mean())

    def configure_optimizers(self):
        return instantiate(self.hparams.optimizer, params=self.parameters())
"""
FILES = {
    "project.py": MODULE,
    "conf/data/own.yaml": "_target_: project.Data\nsizes: [8, 2]\n",
    "conf/model/own.yaml": """
_target_: project.Model
_recursive_: false
cfg: {bias: false, widths: [1, 2], lr: "${lr}"}
net: {_target_: torch.nn.Linear, in_features: 4, out_features: 1}
optimizer: {_target_: torch.optim.SGD, lr: "${model.cfg.lr}"}
out: ${hydra:runtime.output_dir}/x
""",
    "conf/experiment/own.yaml": """
# @package _global_
defaults: [override /model: own, override /data: own]
lr: 0.1
trainer: {max_epochs: 2}
hydra: {job: {name: theirs}}
""",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.lstrip())
    return folder


@pytest.fixture(autouse=True)
def no_state_left() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


def seen(said: str) -> Any:
    return json.loads(next(line for line in said.splitlines() if line.startswith("SEEN "))[5:])


def test_hydras_state_is_that_of_a_job_of_its_own(project: Path) -> None:
    run, said = fit(project, "experiment=own", "seed=3")
    found = seen(said)
    assert found["types"] == ["DictConfig", "DictConfig", "DictConfig", "ListConfig"]
    assert (found["name"], found["mode"], found["model"]) == ("theirs", "RUN", "own")
    assert (found["out"], found["given"]) == (str(run.path), f"{run.path}/x")
    assert {"experiment=own", "seed=3"} <= set(found["task"])
    assert found["cwd"] == found["original"] == str(project)
    assert found["absolute"] == f"{project}/a"


def test_a_dictconfig_in_the_hyper_parameters_resumes_and_evaluates(project: Path) -> None:
    whole, _ = fit(project, "experiment=own", "trainer.max_epochs=4")
    part, _ = fit(project, "experiment=own", "trainer.max_epochs=2")
    newest = CheckpointStore(part.checkpoints_dir).committed()[-1]
    stored = torch.load(newest.path / "state.pt", weights_only=True)
    assert stored["hyper_parameters"]["cfg"]["widths"] == [1, 2]
    config = part.config_path.read_text().replace("max_epochs: 2", "max_epochs: 4")
    part.config_path.write_text(config)
    attempt(part, project)
    ours, theirs = weights(part), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with working_in(project):
        newest = CheckpointStore(part.checkpoints_dir).committed()[-1]
        assert evaluate(part, newest.path, "val")["val_loss"] > 0


def test_chdir_verbose_and_job_logging_are_done(project: Path) -> None:
    extra = [
        *("hydra.job.chdir=true", "hydra.verbose=[project]", "hydra/job_logging=default"),
        "hydra.job_logging.handlers.file.filename='${hydra.runtime.output_dir}/mine.log'",
    ]
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        run, said = fit(project, "experiment=own", *extra)
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            handler.close()
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
        logging.getLogger("project").setLevel(logging.NOTSET)
    assert seen(said)["cwd"] == str(run.path)
    assert seen(said)["original"] == str(project)
    assert "[project][DEBUG] - a detail" in (run.path / "mine.log").read_text()
    assert Path(os.getcwd()) != run.path


def test_a_run_of_before_gets_plain_containers(project: Path) -> None:
    run = new_run(project, ["experiment=own"])
    older = MODULE.replace("assert type(sizes) is ListConfig", "assert type(sizes) is list")
    older = older.replace("job = HydraConfig.get()", "assert not HydraConfig.initialized(); return")
    older = older.replace("bias=cfg.bias", "bias=cfg['bias']")
    for file in (run.path / ".hydra").iterdir():
        file.unlink()
    (run.path / ".hydra").rmdir()
    (project / "project.py").write_text(older)
    try:
        attempt(run, project)
    finally:
        (project / "project.py").write_text(MODULE)
