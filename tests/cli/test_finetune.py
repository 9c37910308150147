"""`finetune.init_from` on the command line: a run by its name, and a job that goes on exactly after a kill."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import TrainerCli
from trainer.cli.initial import settle_start
from trainer.core.errors import UserError

APART = Path(sys.prefix) / "transformers"
"""Where ./launch/test puts transformers and peft."""
JOB = ["experiment=quickstart", "tracking=none", "resources.gpus=0", "trainer.max_steps=4", "trainer.max_epochs=null"]
JOB += ["trainer.limit_val_batches=0", "resources.cpu_processes=1"]
HEAD_ONLY = ['finetune.freeze=["*"]', "finetune.train=[head]"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints/step-00000004/state.pt", weights_only=True)
    return state["state_dict"]  # type: ignore[return-value]


def test_a_run_trains_on_from_another_with_all_but_the_head_frozen(trainer_cli: TrainerCli, workdir: Path) -> None:
    for overrides in (["name=base"], ["name=tuned", "finetune.init_from=base", *HEAD_ONLY]):
        done = trainer_cli("fit", *JOB, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
    (base,), (tuned,) = (list((workdir / "runs").glob(f"{name}-*")) for name in ("base", "tuned"))
    checkpoint = base / "checkpoints" / "step-00000004"
    assert f"weights from {checkpoint}: 10 of 10 tensors" in done.stdout
    assert "51,594 parameters (1,290 trainable), ddp on 1 rank," in done.stdout
    before, after = weights(base), weights(tuned)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"model.head.weight", "model.head.bias"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "finetune.init_from=nothing: there are no runs in runs"),
        ("gone/weights.pth", "finetune.init_from=gone/weights.pth: there is no such file"),
        ("gone/run", "finetune.init_from=gone/run: gone/run does not exist"),
        ("notes.txt", r"unknown file type.*\n.*\.safetensors"),
    ],
)
def test_what_holds_no_weights_is_refused_at_the_prompt(workdir: Path, reference: str, message: str) -> None:
    (workdir / "notes.txt").touch()
    with pytest.raises(UserError, match=message):
        settle_start({"runs_dir": "runs", "finetune": {"init_from": reference}})


@pytest.mark.parametrize("name", ["weights.safetensors", "last.ckpt", "."])
def test_files_and_folders_of_weights_become_absolute_paths(workdir: Path, name: str) -> None:
    for file in ("weights.safetensors", "last.ckpt"):
        (workdir / file).touch()
    config = {"runs_dir": "runs", "finetune": {"init_from": name}}
    settle_start(config)
    assert config["finetune"] == {"init_from": str(workdir / name)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (APART / "peft").is_dir(), reason=f"./launch/test puts transformers and peft into {APART}")
def test_lora_from_a_run_resumes_exactly(trainer_cli: TrainerCli, workdir: Path) -> None:
    model = ["model=transformer", "model.dim=32", "model.layers=2", "model.dropout=0.1"]
    data = ["data=text", "data.sequence_length=32", "trainer.limit_val_batches=0", "resources.gpus=0"]
    base = [*model, *data, "tracking=none", "name=base", "trainer.max_epochs=null", "trainer.max_steps=4"]
    done = trainer_cli("fit", *base)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (workdir / "runs").iterdir()
    lora = [f"finetune.init_from={run}", "finetune.lora_rank=2", "finetune.lora_dropout=0.1", "finetune.train=[norm]"]
    steps = ["--steps", "8", "--kills", "1"]
    done = trainer_cli("verify-resume", *model, *data, *lora, *steps, timeout=400, env={"PYTHONPATH": str(APART)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 1;" in done.stdout
