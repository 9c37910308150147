"""Networks made, sharded or split in `setup` and `configure_model`, and modules without an optimizer: the weights of
plain Lightning, on any strategy, also after a resume."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from tests.conftest import TrainerCli
from tests.distributed.ranks import run_ranks
from tests.train import late_project
from tests.train.in_process import new_run, weights
from trainer import strategies
from trainer.config.instantiate import freeze
from trainer.config.strategy import Ddp
from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory
from trainer.strategies.ddp import RunDDPStrategy
from trainer.train.deferred_modules import call_when_built

FIRST, LAST = 3, 8
"""Steps of an epoch of 4: the second run resumes in mid-epoch."""
CLIP = 0.05


@dataclass(frozen=True)
class Case:
    made: str
    strategy: str = "ddp"
    given: list[str] = field(default_factory=list)
    like: str = "InInit"
    """The class that plain Lightning trains."""
    clip: float | None = None


TP = ["strategy.tensor_parallel_size=2"]
HSDP = ["strategy.shard_size=1"]
CLIPPED = [f"trainer.gradient_clip_norm={CLIP}", "data.micro_batch=4"]
ON_TWO_RANKS = {
    "setup_ddp": Case("InSetup"),
    "setup_fsdp": Case("InSetup", "fsdp"),
    "setup_zero2": Case("InSetup", "deepspeed_zero2"),
    "configure_ddp": Case("InConfigureModel"),
    "configure_zero1": Case("InConfigureModel", "deepspeed_zero1"),
    "configure_zero3": Case("InConfigureModel", "deepspeed_zero3"),
    "filled_fsdp": Case("Filled", "fsdp"),
    "shards_fsdp": Case("Shards", "fsdp"),
    "shards_clipped": Case("Shards", "fsdp", CLIPPED, clip=CLIP),
    "shards_torch": Case("ShardsByTorchsNames", "hsdp", HSDP),
    "shards_some": Case("ShardsSome", "fsdp"),
    "splits_tp": Case("Splits", "tp", TP),
    "splits_clipped": Case("Splits", "tp", [*TP, *CLIPPED], clip=CLIP),
    "splits_shards_tp": Case("SplitsAndShards", "tp", TP),
    "meta_fsdp": Case("OnMeta", "fsdp", like="AsOnMeta"),
    "none_ddp": Case("NoOptimizer", like="NoOptimizer"),
}
MORE_ON_TWO_RANKS = {
    "setup_zero3": Case("InSetup", "deepspeed_zero3"),
    "configure_fsdp": Case("InConfigureModel", "fsdp"),
    "shards_hsdp": Case("Shards", "hsdp", HSDP),
    "none_fsdp": Case("NoOptimizer", "fsdp", like="NoOptimizer"),
}
"""Beside those above, where each strategy, each class and each mesh comes at least once."""
FREEZE = ["finetune.freeze=[net.0]"]
ON_ONE_RANK = {
    "setup_single": Case("InSetup", "single"),
    "shards_alone": Case("Shards", "fsdp"),
    "setup_frozen": Case("InSetupFiltered", "single", FREEZE, like="Frozen"),
    "setup_init_from": Case("InSetup", "single", ["finetune.init_from=other.ckpt"], like="FromElsewhere"),
    "steps_directly": Case("StepsDirectly", "single"),
    "none_single": Case("NoOptimizer", "single", like="NoOptimizer"),
    "bank_none": Case("Bank", "single", like="Bank"),
    "bank_list": Case("BankWithList", "single", like="Bank"),
}


@cache
def plain(made: str, clip: float | None) -> tuple[dict[str, Tensor], float]:
    """Weights after two epochs with Lightning's own Trainer in one process, and its `val_loss`."""
    module = getattr(late_project, made)()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=2, gradient_clip_val=clip, enable_checkpointing=False, **quiet)
    trainer.fit(module, datamodule=late_project.Data(batch_size=16))
    (found,) = trainer.validate(module, datamodule=late_project.Data(batch_size=16), verbose=False)
    return dict(module.state_dict()), found["val_loss"]


def write_project(folder: Path, made: dict[str, list[str]]) -> None:
    shutil.copy(Path(late_project.__file__), folder)
    for group, targets in made.items():
        (folder / "conf" / group).mkdir(parents=True, exist_ok=True)
        for target in targets:
            (folder / "conf" / group / f"{target}.yaml").write_text(f"_target_: late_project.{target}\n")


def longer(run: RunDirectory) -> RunDirectory:
    """The same run up to step LAST; composing and checking it again would take as long as training it."""
    other = RunDirectory(run.path.with_name(f"{run.name}-longer"))
    shutil.copytree(run.path, other.path)
    config = run.config()
    config["trainer"]["max_steps"] = LAST
    other.config_path.write_text(freeze(config))
    return other


def run_all(folder: Path, ranks: int, cases: dict[str, Case]) -> dict[str, dict[str, float]]:
    """Train each case in two runs, of which the second resumes, and compare with plain Lightning; what the ranks
    measured when they evaluated."""
    write_project(folder, {"data": ["Data"], "model": [case.made for case in cases.values()]})
    jobs = {}
    for name, case in cases.items():
        given = [f"name={name}", f"model={case.made}", f"strategy={case.strategy}", "data=Data", "data.batch_size=16"]
        given += [f"resources.cpu_processes={ranks}", *case.given]
        first = new_run(folder, [*given, f"trainer.max_steps={FIRST}"])
        jobs[name] = [str(first.path), str(longer(first).path)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(ranks, Path(__file__).with_name("late_ranks.py"), [str(folder / "jobs.json")], folder, timeout_s=400)
    evaluated: dict[str, dict[str, float]] = json.loads((folder / "evaluated.json").read_text())
    for name, (_, second_path) in jobs.items():
        case = cases[name]
        expected, loss = plain(case.like, case.clip)
        found = weights(RunDirectory(Path(second_path)))
        assert found.keys() == expected.keys(), name
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-6, msg=f"{name}: {key} differs")
        assert evaluated[name]["val_loss"] == pytest.approx(loss, abs=1e-5), name
    return evaluated


@pytest.mark.filterwarnings("ignore")
def test_two_ranks(tmp_path: Path) -> None:
    run_all(tmp_path, 2, ON_TWO_RANKS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_more_on_two_ranks(tmp_path: Path) -> None:
    run_all(tmp_path, 2, MORE_ON_TWO_RANKS)


@pytest.mark.filterwarnings("ignore")
def test_one_rank(tmp_path: Path) -> None:
    torch.save({"state_dict": late_project.FromElsewhere().state_dict()}, tmp_path / "other.ckpt")
    evaluated = run_all(tmp_path, 1, ON_ONE_RANK)
    assert evaluated["setup_single"]["onnx"] < 1e-5


def test_check_deep_counts_them(trainer_cli: TrainerCli, workdir: Path) -> None:
    made = {"model": ["InSetup", "InConfigureModel"], "data": ["Data"]}
    write_project(workdir, made)
    counted = {}
    for model, data in (("InSetup", ["data=Data"]), ("InConfigureModel", ["data=Data"]), ("InSetup", [])):
        done = trainer_cli("check", "--deep", f"model={model}", *data, "resources.gpus=0", "tracking=none")
        assert done.returncode == 0, done.stdout + done.stderr
        counted[(model, *data)] = done.stdout
    parameters = sum(one.numel() for one in late_project.network().parameters())
    for model in made["model"]:
        assert f"parameters {parameters}\n" in counted[(model, "data=Data")]
    assert "not counted: InSetup builds its layers in setup or configure_model: AttributeError" in counted[("InSetup",)]


class Needs(late_project.InConfigureModel):
    def configure_model(self) -> None:
        self.device_mesh["data_parallel"]  # type: ignore[index]


def test_without_a_mesh_the_strategies_that_have_one_are_named() -> None:
    module = Needs()
    call_when_built(module, lambda: None)
    with pytest.raises(UserError, match=r"Needs.configure_model uses self.device_mesh") as caught:
        module.configure_model()
    assert "strategy=fsdp" in caught.value.fix


def test_what_waits_is_called_once_and_the_hook_is_the_users_again() -> None:
    module = late_project.InConfigureModel()
    called: list[int] = []
    for number in range(2):
        call_when_built(module, lambda number=number: called.append(number))  # type: ignore[misc]
    assert called == []
    assert is_overridden("configure_model", module)
    module.configure_model()
    net = module.net
    module.configure_model()
    assert called == [0, 1]
    assert module.net is net
    assert "configure_model" not in vars(module)


def test_ddp_without_anything_to_train_is_refused() -> None:
    strategy = strategies.build(Ddp(), 2, torch.device("cpu"), 60.0)
    assert isinstance(strategy, RunDDPStrategy)
    with pytest.raises(UserError, match="no trainable parameters"):
        strategy._setup_model(late_project.Bank())
