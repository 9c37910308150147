"""`trainer plan` on shipped experiments, on our decoder and on a module of the user's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from trainer.hardware.catalogue import device
from trainer.plan import closed_form, parts

LLAMA = ["plan", "model=llama3_8b", "resources.gpus=8", "data.batch_size=8", "--json"]


def planned(arguments: list[str], trainer_cli: TrainerCli) -> dict[str, Any]:
    """The JSON of a plan."""
    done = trainer_cli(*arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_8b_fits_on_eight_gpus_with_fsdp(trainer_cli: TrainerCli, workdir: Path) -> None:
    answer = planned([*LLAMA, "strategy=fsdp", "--gpu", "NVIDIA H200"], trainer_cli)
    job = answer["job"]
    assert job["fits"] is True
    assert job["engine"] == "formula"
    assert sum(job["parts"].values()) == job["peak_bytes"]
    assert job["needed_bytes"] == job["peak_bytes"] + sum(job["allowances"].values())
    # 8,030,261,248 parameters in float32 over 8 ranks, and two states
    assert job["parts"][parts.OPTIMIZER] == pytest.approx(8_030_261_248, rel=1e-3)
    assert answer["device"]["memory_bytes"] == device("NVIDIA H200").memory_bytes
    assert "not known" in job["peak_error"]


def test_what_does_not_fit_ends_with_2_and_names_what_does(trainer_cli: TrainerCli, workdir: Path) -> None:
    done = trainer_cli(*LLAMA, "strategy=ddp", "--gpu", "NVIDIA H100 80GB HBM3")
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert answer["job"]["fits"] is False
    fitting = [one for one in answer["alternatives"] if one["fits"]]
    assert fitting
    assert f"the nearest that fits: {fitting[0]['overrides']}" in done.stderr
    for one in answer["alternatives"]:
        assert one["micro_batch"] * one["accumulate"] * 8 == 8, "the same global batch"


@pytest.mark.executed
def test_a_plan_in_closed_form_imports_no_torch_and_takes_less_than_2_s(workdir: Path) -> None:
    code = (
        "import sys, time\nfrom trainer.cli import main\n"
        f"code = main({[*LLAMA[:-1], 'strategy=fsdp', '--gpu', 'NVIDIA H200']!r})\n"
        "assert 'torch' not in sys.modules\nassert time.process_time() < 2, time.process_time()\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "optimizer" in done.stdout
    assert re.search(r"^speed +[\d,]+ tokens/s, MFU \d+\.\d%$", done.stdout, re.MULTILINE)


def test_a_shipped_experiment_is_simulated(trainer_cli: TrainerCli, workdir: Path) -> None:
    arguments = ["plan", "experiment=quickstart", "resources.gpus=0", "resources.cpu_processes=2", "--json"]
    arguments += ["--alternatives", "0"]
    job = planned(arguments, trainer_cli)["job"]
    assert job["engine"] == "simulation"
    assert job["fits"] is None
    assert (job["strategy"], job["micro_batch"]) == ("ddp", 16)
    weights = job["parts"][parts.PARAMETERS]
    assert weights <= job["parts"][parts.GRADIENTS] + 512 * 16
    assert job["parts"][parts.OPTIMIZER] >= 2 * weights * 0.9


def test_text_is_planned_from_its_data(trainer_cli: TrainerCli, workdir: Path) -> None:
    (workdir / "texts").mkdir()
    for index in range(4):
        (workdir / "texts" / f"{index}.txt").write_text("To be, or not to be. " * 600)
    arguments = ["plan", "experiment=text_transformer", "data.root=texts", "data.patterns=null", "data.batch_size=8"]
    arguments += ["model.layers=2", "--alternatives", "4"]
    answer = planned([*arguments, "strategy=fsdp", "resources.gpus=2", "--gpu", "Tesla T4", "--json"], trainer_cli)
    assert answer["job"]["fits"] is True
    assert answer["job"]["parts"][parts.BUCKETS] > 0
    assert {one["strategy"] for one in answer["alternatives"]} >= {"ddp", "fsdp"}


def test_a_module_of_ones_own_is_simulated(trainer_cli: TrainerCli, workdir: Path) -> None:
    (workdir / "mine.py").write_text(
        textwrap.dedent("""
        import lightning, torch
        class Mine(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1000, 1000, bias=False)
            def training_step(self, batch):
                loss = self.layer(batch[0]).square().mean()
                self.log("loss", loss)
                return loss
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            def train_dataloader(self):
                data = torch.utils.data.TensorDataset(torch.zeros(64, 1000))
                return torch.utils.data.DataLoader(data, batch_size=8)
        """)
    )
    arguments = ["plan", "model._target_=mine.Mine", "data=none", "resources.gpus=0", "strategy=single", "--json"]
    arguments += ["trainer.max_epochs=3", "--alternatives", "0"]
    job = planned(arguments, trainer_cli)["job"]
    assert job["micro_batch"] == 8, "of its own loader"
    assert job["forecast"]["steps"] == 3 * 64 / 8
    assert job["parts"][parts.PARAMETERS] == pytest.approx(4e6, rel=0.01)
    assert job["parts"][parts.OPTIMIZER] == pytest.approx(4e6, rel=0.01)


def test_the_chunks_of_the_loss_are_those_of_the_model() -> None:
    from trainer.models import linear_cross_entropy

    assert closed_form.CHUNK_BYTES["cpu"] == linear_cross_entropy.CHUNK_BYTES["cpu"]
    assert closed_form.CHUNK_BYTES["cuda"] == linear_cross_entropy.CHUNK_BYTES_ELSEWHERE
