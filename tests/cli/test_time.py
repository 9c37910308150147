"""`trainer time`: a short job is measured, what fits is printed, and later plans are calibrated by it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from trainer.cli import main
from trainer.cli.job import check_all
from trainer.cli.time_report import keep, planned
from trainer.config.compose import compose
from trainer.core.errors import UserError
from trainer.core.records import dumps
from trainer.plan import calibration
from trainer.plan.timing import duration_of, fitting, timed
from trainer.runs.directory import RunDirectory
from trainer.runs.records import StepTiming

JOB = ["experiment=quickstart", "resources.gpus=0", "resources.cpu_processes=1"]


def rank(*each_s: float, cpu_s: float = 0.1, threads: int = 1, device: str | None = None) -> StepTiming:
    return StepTiming(
        steps=len(each_s),
        wall_s=sum(each_s),
        cpu_s=cpu_s * len(each_s),
        each_s=list(each_s),
        each_cpu_s=[cpu_s] * len(each_s),
        threads=threads,
        steps_per_epoch=10,
        device=device,
    )


def test_a_short_job_is_measured_and_calibrates_the_plan(
    workdir: Path, trainer_cli: TrainerCli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(workdir / "cache")
    done = trainer_cli(
        "time", *JOB, "--steps", "12", "--warmup", "3", "--for", "1h", "--budget", "2", "--json",
        "cluster.price_per_cpu_core_hour=0.5",
        env={"XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["steps"], report["ranks"], report["steps_per_epoch"]) == (12, 1, 39)
    assert 0 < report["fastest_s"] <= report["step_s"] <= report["slowest_s"]
    assert report["samples_s"] == pytest.approx(32 / report["step_s"])
    assert report["save_bytes"] > 100_000
    in_time, for_money = report["fits"]
    assert in_time["steps"] == int(3600 / report["step_s"])
    assert in_time["overrides"] == f"trainer.max_steps={in_time['steps']} trainer.max_epochs=-1"
    assert for_money["seconds"] == pytest.approx(4 * 3600)
    assert not list((workdir / "runs").glob("*")), "the run of the short job is deleted"

    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    (kept,) = calibration.measurements(report["kept"])
    assert calibration.keep(kept) == ""
    assert kept.step_s == report["calibrating_s"]
    assert kept.work.trained == kept.work.elements == 51_594
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["plan", *JOB, "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)["job"]["forecast"]
    assert forecast["step_s"] == pytest.approx(kept.step_s, rel=0.01), "the measured job is planned as measured"
    assert "1 measurement of the same kind" in forecast["calibration"]


def test_the_slowest_rank_decides() -> None:
    found = timed([rank(1.0, 1.0, 3.0), rank(2.0, 2.0, 2.5)])
    assert (found.step_s, found.fastest_s, found.slowest_s, found.ranks) == (2.0, 2.0, 2.5, 2)
    assert (found.basis, found.is_busy) == ("cpu", True)
    assert found.calibrating_s == pytest.approx(0.1)
    assert timed([rank(1.0, 3.0, threads=2)]).calibrating_s == 1.0, "the fastest: threads are not always busy"
    on_gpu = timed([rank(1.0, 1.0, 4.0, device="NVIDIA H200")])
    assert (on_gpu.step_s, on_gpu.basis, on_gpu.units) == (2.0, "wall", 1)
    with pytest.raises(UserError, match="no step"):
        timed([])


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800.0), ("90min", 5400.0), ("1d12h", 129600.0), ("1.5h", 5400.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_of(text, "--for") == seconds


def test_whole_steps_fit() -> None:
    assert (fitting(10.0, 3.0), fitting(0.3, 0.1), fitting(1.0, 2.0)) == (3, 3, 0)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--for", "8"], r"--for 8: not a duration"),
        (["--for", "0h"], r"--for 0h: no time"),
        (["--budget", "10"], r"--budget needs a price\n  set cluster.price_per_cpu_core_hour"),
        (["--for", f"{'9' * 400}d"], r"d: more than a thousand years"),
        (["--budget", "nan"], r"--budget nan"),
        (["--budget", "inf"], r"--budget inf: not an amount"),
        (["--budget", "10", "resources.gpus=null"], r"set cluster.price_per_cpu_core_hour"),
        (["--steps", "0"], r"--steps 0: too few"),
        (["-m", "seed=1,2"], r"measure one job at a time"),
    ],
)
def test_a_mistake_trains_nothing(
    arguments: list[str], problem: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["time", *JOB, *arguments]) == 2
    assert re.search(problem, capsys.readouterr().err)
    assert not (workdir / "runs").exists()


def test_records_of_ranks_have_one_reader(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for number in (10, 2):
        run.timing_path(number).parent.mkdir(exist_ok=True)
        run.timing_path(number).write_text(dumps(rank(float(number))))
    kept: list[Any] = run.timings()
    assert [one.wall_s for one in kept] == [2.0, 10.0]


def test_ends_of_epochs_count_once_an_epoch_was_measured() -> None:
    """Every tenth step ends an epoch and takes longer, which a median does not have."""
    busy = [0.1] * 9 + [1.1]
    epoch, part = (replace(rank(*[1.0] * len(each)), each_cpu_s=each, cpu_s=sum(each)) for each in (busy, busy[1:]))
    assert timed([epoch]).calibrating_s == pytest.approx(0.2), "the mean of a whole epoch"
    assert timed([part]).calibrating_s == pytest.approx(0.1), "the median of a part"


def test_a_cache_that_cannot_be_written_calibrates_nothing(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    (job,) = check_all([compose([*JOB, "trainer.max_steps=9"], config_dirs=[])])
    run = RunDirectory(workdir / "runs" / "short-abcdefgh")
    found = timed([rank(0.1, 0.1)])
    plan, around = planned(job, run, job.config, True, None)
    (workdir / "file").touch()
    monkeypatch.setattr(calibration, "folder", lambda: workdir / "file")
    assert keep(found, plan, around, run) == f"no: it cannot be kept in {workdir}/file: File exists"


PROJECT = """
import torch
from lightning.pytorch import LightningModule

class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()
    def validation_step(self, batch):
        self.log("val/loss", self.layer(batch[0]).square().mean())
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(16, 8)), batch_size=4)
    def val_dataloader(self):
        return self.train_dataloader()
"""


def test_a_job_that_follows_what_its_validation_logs_is_measured(workdir: Path, trainer_cli: TrainerCli) -> None:
    """The short job has no validation, but ends of epochs, at which the metric is looked for."""
    (workdir / "mine.py").write_text(PROJECT)
    job = ["model._target_=mine.Mine", "data=none", "resources.gpus=0", "strategy=single", "trainer.max_epochs=9"]
    done = trainer_cli("time", *job, "checkpoint.monitor=val/loss", "--steps", "10", "--warmup", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (json.loads(done.stdout)["steps"], json.loads(done.stdout)["steps_per_epoch"]) == (10, 4)
