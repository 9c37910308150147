"""Names of the lightning-hydra-template and of LightningCLI outside of `trainer`: translated or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checks.config import check
from trainer.cli.lightning_cli import rewritten
from trainer.config.compose import compose
from trainer.core.errors import UserError


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("task_name=abc", "write name=abc"),
        ("tags=[dev]", "write tracking.tags=[dev]"),
        ("ckpt_path=x.ckpt", "finetune.init_from=x.ckpt"),
        ("+ckpt_path=x.ckpt", "finetune.init_from=x.ckpt"),
        ("train=false", "trainer evaluate RUN"),
        ("test=true", "trainer evaluate RUN --split=test"),
        ("extras.print_config=true", "trainer fit --cfg job"),
        ("hparams_search=mnist_optuna", "-m optimizer.lr=0.1,0.01"),
        ("optimized_metric=val/acc", "write checkpoint.monitor=val/acc"),
        ("seed_everything=3", "write seed=3"),
        ("limit_train_batches=4", "write trainer.limit_train_batches=4"),
        ("learning_rate=0.1", "write optimizer.lr=0.1"),
        ("epochs=3", "write trainer.max_epochs=3"),
        ("lr_scheduler=step", "write scheduler=step"),
    ],
)
def test_a_top_level_name_comes_with_a_replacement(override: str, fix: str, workdir: Path) -> None:
    with pytest.raises(UserError) as caught:
        compose([override], config_dirs=[])
    assert fix in caught.value.fix
    assert "did you mean" not in caught.value.fix


def test_task_name_is_the_default_name_of_the_run(workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf/train.yaml").write_text("defaults: [model: mlp, data: digits, _self_]\ntask_name: pretrain\n")
    assert compose([], config_dirs=[], config_name="train").config["name"] == "pretrain"
    assert compose(["name=other"], config_dirs=[], config_name="train").config["name"] == "other"


def test_keys_of_the_template_are_accepted(workdir: Path) -> None:
    (workdir / "conf").mkdir()
    text = (
        "defaults:\n  - config\n  - _self_\ntask_name: train\ntags: [dev]\ntrain: true\ntest: true\nckpt_path: null\n"
    )
    (workdir / "conf/train.yaml").write_text(text + "extras:\n  print_config: true\n")
    composed = compose(["resources.gpus=0"], config_dirs=[], config_name="train")
    check(composed.config)
    assert any("trainer evaluate RUN --split=test" in note for note in composed.notes)
    for line in ("ckpt_path: a.ckpt", "train: false"):
        (workdir / "conf/train.yaml").write_text(
            f"{text}{line}\n".replace("ckpt_path: null\n", "").replace("train: true\n", "")
        )
        with pytest.raises(UserError):
            compose(["resources.gpus=0"], config_dirs=[], config_name="train")


def test_the_seed_of_the_template_is_null(workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf/train.yaml").write_text("defaults: [config, _self_]\nseed: null\n")
    composed = compose(["resources.gpus=0"], config_dirs=[], config_name="train")
    assert composed.config["seed"] == 0
    assert any("set seed=NUMBER" in note for note in composed.notes)
    assert compose(["seed=3"], config_dirs=[], config_name="train").notes == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--trainer.max_epochs=5 --model.lr 0.1", "write trainer.max_epochs=5 model.lr=0.1"),
        ("seed=1 --trainer.devices 2", "write seed=1 trainer.devices=2"),
        ("--model my.Net --model.init_args.width=3", "write model._target_=my.Net model.width=3"),
        ("--optimizer=Adam --optimizer.lr=0.1", "write optimizer._target_=torch.optim.Adam optimizer.lr=0.1"),
        ("--lr_scheduler=StepLR", "write scheduler._target_=torch.optim.lr_scheduler.StepLR"),
        ("--seed_everything 3 --print_config", "write seed=3 --cfg job"),
        ("--ckpt_path=a.ckpt", "write finetune.init_from=a.ckpt"),
        ("--config cfg/mine.yaml", "write experiment=mine; cfg/mine.yaml becomes conf/experiment/mine.yaml"),
    ],
)
def test_a_command_line_of_lightning_cli_is_rewritten(line: str, says: str) -> None:
    assert rewritten(line.split()).startswith(says)


def test_other_options_are_not_rewritten() -> None:
    assert rewritten(["--folow", "seed=1"]) == ""


def test_a_class_path_comes_with_a_replacement(workdir: Path) -> None:
    (workdir / "conf/model").mkdir(parents=True)
    (workdir / "conf/model/mine.yaml").write_text("class_path: my.Net\ninit_args:\n  width: 3\n")
    with pytest.raises(UserError) as caught:
        check(compose(["model=mine", "resources.gpus=0"], config_dirs=[]).config)
    assert "_target_: my.Net" in str(caught.value)
    (workdir / "conf/model/mine.yaml").write_text("_target_: trainer.models.mlp.MLP\nclass_path: my.Net\n")
    with pytest.raises(UserError, match=r"write _target_: my\.Net for class_path"):
        check(compose(["model=mine", "resources.gpus=0"], config_dirs=[]).config)
    for written, meant in (("model.class_path=my.Net", "_target_=my.Net"), ("model.init_args.width=3", "width=3")):
        with pytest.raises(UserError, match=f"write model.{meant}$"):
            compose([written], config_dirs=[])


@pytest.mark.parametrize("option", ["default", "fdr", "limit", "profiler", "overfit", "fast"])
def test_debug_presets_pass(option: str, workdir: Path) -> None:
    check(compose([f"debug={option}", "resources.gpus=0"], config_dirs=[]).config)
