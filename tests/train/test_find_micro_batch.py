"""`trainer.find_micro_batch`: the largest micro-batch that fits, with an out-of-memory error at a known size."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import TrainerCli
from tests.train.in_process import attempt, fit, new_run, weights
from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.core import host_memory
from trainer.core.errors import TrainerError
from trainer.runs.directory import RunDirectory
from trainer.train import find_micro_batch

MODULES = '''
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningDataModule, LightningModule

class Numbers(LightningDataModule):
    def __init__(self, batch_size: int = 24):
        super().__init__()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(48, 6, generator=generator)
        return DataLoader(TensorDataset(inputs, inputs.sum(1)), batch_size=24, shuffle=True)

class Net(LightningModule):
    """Out of memory above `most` samples, on the ranks from `rank`."""

    def __init__(self, most: int = 100, rank: int = 0):
        super().__init__()
        self.most, self.first = most, rank
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        print("batch of", len(batch[0]), "accumulated", self.trainer.accumulate_grad_batches)
        loss = (self.layers(batch[0])[:, 0] - batch[1]).square().mean()
        if len(batch[0]) > self.most and int(os.environ.get("RANK", "0")) >= self.first:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)
'''
JOB = ["model._target_=modules.Net", "data._target_=modules.Numbers", "task=auto", "data.batch_size=24"]
JOB += ["trainer.log_every_n_steps=1", "trainer.max_steps=4", "trainer.max_epochs=null"]
FIND = "trainer.find_micro_batch=true"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules.py").write_text(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def events_of(run: Path, name: str) -> list[dict[str, Any]]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == name]


def losses(run: RunDirectory) -> list[float]:
    lines = map(json.loads, run.metrics_path.read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_the_largest_that_fits_trains_as_if_it_had_been_given(project: Path) -> None:
    fixed, _ = fit(project, *JOB, "+model.most=8", "data.micro_batch=8", "name=fixed")
    run, output = fit(project, *JOB, "+model.most=8", "data.micro_batch=auto", "name=found")
    assert (run.config()["trainer"]["find_micro_batch"], run.config()["data"]["micro_batch"]) == (True, None)
    (event,) = events_of(run.path, "micro_batch_found")
    assert (event["micro_batch"], event["too_large"], event["batch_size"]) == (8, 12, 24)
    trial, training = output.split("micro-batch 8 fits (12 does not fit)")
    tried = [int(line.split()[2]) for line in trial.splitlines() if line.startswith("batch of")]
    assert tried == [*(size for size in (2, 3, 4, 6, 8) for _ in range(4)), 12]
    assert "batch of 8 accumulated 2" in trial
    assert "global batch 24 = 1 rank x 8 x 3 accumulated" in training
    for name, value in weights(fixed).items():  # with dropout and running statistics: no draw of the trial is left
        assert torch.equal(value, weights(run)[name]), name
    assert losses(run) == losses(fixed)
    assert len(losses(run)) == 4


def test_a_resume_uses_what_was_found_without_a_trial(project: Path) -> None:
    run = new_run(project, [*JOB, "+model.most=6", FIND])
    attempt(run, project)
    run.config_path.write_text(run.config_path.read_text().replace("max_steps: 4", "max_steps: 6"))
    resumed = attempt(run, project)
    assert "resumed from step 4" in resumed
    assert "1 rank x 6 x 4 accumulated" in resumed
    assert {line for line in resumed.splitlines() if line.startswith("batch of")} == {"batch of 6 accumulated 4"}
    assert len(events_of(run.path, "micro_batch_found")) == 1


def test_a_whole_share_is_tried_without_accumulation(project: Path) -> None:
    run, output = fit(project, *JOB, FIND)
    (event,) = events_of(run.path, "micro_batch_found")
    assert (event["micro_batch"], event["too_large"]) == (24, None)
    assert output.count("batch of 24 accumulated 1") == 4 + 4  # the trial's and the run's
    assert "batch of 12 accumulated 2" in output


def test_if_nothing_fits_the_run_fails_for_want_of_memory(project: Path) -> None:
    run = new_run(project, [*JOB, "+model.most=0", FIND])
    attempt(run, project, outcome="failed")
    assert "ran out of memory with a micro-batch of 2" in run.attempts()[-1].reason
    assert events_of(run.path, "micro_batch_found") == []


def test_the_host_is_not_filled(project: Path) -> None:
    """16.8 MB a sample: 134 MB for 8, 201 MB for 12, of which Linux would kill the process."""
    source = (project / "modules.py").read_text()
    (project / "modules.py").write_text(
        source.replace("return loss", "held = torch.ones(len(batch[0]), 2**22)\n        return loss")
    )
    with mock.patch.object(host_memory, "available_bytes", return_value=150_000_000):
        run, output = fit(project, *JOB, FIND)
    (event,) = events_of(run.path, "micro_batch_found")
    assert (event["micro_batch"], event["too_large"]) == (8, 12)
    assert "batch of 12" not in output


def test_an_allocation_that_the_host_refuses_is_out_of_memory(project: Path) -> None:
    source = (project / "modules.py").read_text()
    (project / "modules.py").write_text(
        source.replace('raise torch.OutOfMemoryError("CUDA out of memory")', "torch.empty(2**60)")
    )
    run, _ = fit(project, *JOB, "+model.most=8", FIND)
    (event,) = events_of(run.path, "micro_batch_found")
    assert (event["micro_batch"], event["too_large"]) == (8, 12)
    run = new_run(project, [*JOB, "+model.most=4", "data.micro_batch=8"])
    attempt(run, project, outcome="failed")
    assert "ran out of memory with a micro-batch of 8" in run.attempts()[-1].reason


def test_one_of_two_ranks_runs_out_and_both_restart_with_what_fits_on_both(
    trainer_cli: TrainerCli, workdir: Path
) -> None:
    (workdir / "modules.py").write_text(MODULES)
    job = [*JOB, "tracking=none", "resources.gpus=0", "resources.cpu_processes=2", "+model.most=4", "+model.rank=1"]
    done = trainer_cli("fit", *job, FIND, "name=two", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (workdir / "runs").glob("two-*")
    found = [
        (one["attempt"], one["rank"], one["micro_batch"], one["too_large"])
        for one in events_of(run, "micro_batch_found")
    ]
    assert found == [(0, 1, 4, 6)]
    assert [one["step"] for one in events_of(run, "started")] == [0, 0]
    assert "attempt 0 died: a micro-batch of 6 is too large for rank 1, 4 fits; restarting" in done.stdout + done.stderr
    log = (run / "logs" / "attempt-01" / "rank-0.log").read_text()
    assert "global batch 24 = 2 ranks x 4 x 3 accumulated" in log
    assert {line for line in log.splitlines() if line.startswith("batch of")} == {"batch of 4 accumulated 3"}


def test_a_gpu_is_left_a_margin() -> None:
    with mock.patch("torch.cuda.set_per_process_memory_fraction") as limit:
        with suppress(KeyError), find_micro_batch._less_memory(torch.device("cuda", 0)):
            limit.assert_called_once_with(0.95, torch.device("cuda", 0))
            raise KeyError
        assert limit.call_args.args == (1.0, torch.device("cuda", 0))
        limit.reset_mock()
        with find_micro_batch._less_memory(torch.device("cpu")):
            limit.assert_not_called()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([FIND, "data.micro_batch=4"], "data.micro_batch=null"),
        ([FIND, "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=null"),
        ([FIND, "resilience.max_restarts=0"], "resilience.max_restarts=1 or more"),
        ([FIND, "data.batch_size=null"], "set data.batch_size"),
        (["data.micro_batch=auto"], "use trainer fit, or a number"),
    ],
)
def test_what_contradicts_it_is_refused_at_the_prompt(overrides: list[str], expected: str) -> None:
    with pytest.raises(TrainerError) as refused:
        check(compose(["experiment=quickstart", "resources.gpus=0", *overrides], config_dirs=[]).config)
    assert expected in f"{refused.value}\n{refused.value.fix}"
