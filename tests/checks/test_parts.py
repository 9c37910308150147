"""Mistakes in the arguments of mixtures, Hugging Face models and `finetune` are found before the launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.saved_tables import save_parquet
from trainer.checks.config import check
from trainer.checks.parts import HF_DATASET, problems_of_parts
from trainer.config.compose import compose
from trainer.core.errors import UserError

MIXTURE = [
    "data=mixture",
    "data.sources={a: {_target_: trainer.data.text.Text}, b: {_target_: trainer.data.text.Text}}",
]
HF = "model=hf"
TABLE = "data=hf_dataset"


def checked(*overrides: str) -> None:
    check(compose(["resources.gpus=0", *overrides], config_dirs=[]).config)


@pytest.fixture
def folders(workdir: Path) -> Path:
    for name in ("empty", "shape", "whole", "rows"):
        (workdir / name).mkdir()
    for name in ("shape/config.json", "whole/config.json", "whole/model.safetensors", "rows/0.parquet"):
        (workdir / name).touch()
    save_parquet(workdir / "table" / "0.parquet", {"text": ["a", "b"], "label": [0, 1]})
    return workdir


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*MIXTURE, "data.weights={a: 1}"], "data.weights: no weight for b"),
        ([*MIXTURE, "data.weights={a: 1, b: 2, bb: 3}"], r"data\.weights\.bb: no source.*\n.*did you mean"),
        ([*MIXTURE, "data.weights={a: 1, b: 0}"], r"data\.weights\.b=0: must be more than 0"),
        ([*MIXTURE, "data.weights={a: -1, b: 1}"], r"data\.weights\.a=-1: must be more than 0"),
        ([*MIXTURE, "data.weights={a: much, b: 1}"], r"data\.weights\.a=much: expected a number"),
        ([*MIXTURE, "data.samples=0"], r"data\.samples=0: must be at least 1"),
        (["data=mixture", "data.sources={a: {root: x}}"], r"data\.sources\.a: a source needs a _target_"),
        (["data=mixture", "data.sources={}"], r"data\.sources is empty"),
        ([HF, "model.folder=nowhere"], r"model\.folder=nowhere: no such folder"),
        ([HF, "model.folder=empty"], r"model\.folder=empty contains no config\.json"),
        ([HF, "model.folder=shape"], r"model\.folder=shape contains no \*\.safetensors"),
        ([TABLE, "data.root=nowhere"], r"data\.root=nowhere: no such folder"),
        ([TABLE, "data.root=empty"], r"data\.root=empty: no Parquet or Arrow file"),
        (
            [TABLE, "data.root=rows", "data.text_column=a", "data.ids_column=b"],
            r"data\.text_column and data\.ids_column",
        ),
        (
            [TABLE, "data.root=table", "data.label_column=lable"],
            r"no such column\n.*did you mean data\.label_column=label",
        ),
        ([TABLE, "data.root=rows", "data.text_column=a"], r"0\.parquet cannot be read"),
        (
            ["data=mixture", f"data.sources={{a: {{_target_: {HF_DATASET}, root: table, text_column: txt}}}}"],
            r"data\.sources\.a\.text_column=txt: no such column\n.*data\.sources\.a\.text_column=text",
        ),
        (
            ["data=mixture", f"data.sources={{a: {{_target_: {HF_DATASET}, root: nowhere}}}}"],
            r"data\.sources\.a\.root=nowhere: no such folder",
        ),
        (["data=text", "data.root=nowhere"], r"data\.root=nowhere does not exist"),
        (["data=image_folder", "data.root=nowhere"], r"data\.root=nowhere does not exist.*\n.*one folder per class"),
        (["data=audio_folder", "data.root=nowhere"], r"data\.root=nowhere does not exist"),
        (["data=token_shards", "data.root=empty"], r"data\.root=empty: no finished .*\n.*trainer data tokenize"),
        (["data=fashion_mnist", "data.root=empty"], r"is not in empty.*\n.*dataset-fashion-mnist"),
        (["data=emoji", "data.font=nowhere"], r"is not at nowhere.*\n.*fonts-noto-color-emoji"),
        (["data=text", 'data.root="~nobody-of-this-name/x"'], r"data\.root=~nobody-of-this-name/x: .*\n.*can be read"),
        (["data=text", f"data.root={'x' * 300}"], r"data\.root=xxx.*name too long"),
        ([*MIXTURE, "data.sources.b.root=data.v2/x"], r"data\.sources\.b\.root=data\.v2/x does not exist"),
        ([*MIXTURE, "data.sources.b.root=nowhere"], r"data\.sources\.b\.root=nowhere does not exist"),
        (["finetune.lora_layers=[query]"], r"finetune\.lora_layers has no effect without finetune\.lora_rank"),
        (["finetune.lora_dropout=0.1"], r"finetune\.lora_dropout has no effect without finetune\.lora_rank"),
        (["finetune.lora_rank=8", "finetune.lora_dropout=1.0"], r"finetune\.lora_dropout=1\.0: must be .* less than 1"),
        (["finetune.lora_rank=8", "finetune.lora_alpha=0"], r"finetune\.lora_alpha=0.*: must be more than 0"),
        (['finetune.freeze=["*"]'], r"leaves nothing to train"),
        (["finetune.new=[head]"], r"finetune\.new without finetune\.init_from"),
        (["finetune.freeze=[head]", "finetune.train=[head]"], r"head is in finetune\.freeze and in finetune\.train"),
        (
            ["finetune.init_from=x", "finetune.new=[head]", 'finetune.freeze=["*"]', "finetune.train=[body.3]"],
            r"finetune\.new=\[head\] would start at random.*\n.*finetune\.train=\[head\]",
        ),
        (["finetune.init_from=x", "finetune.new=[head]", "finetune.lora_rank=4"], r"and never be trained"),
    ],
)
def test_each_mistake_is_one_problem(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        checked(*overrides)
    assert "problems in the configuration" not in caught.value.message


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=transformer", *MIXTURE, "data.weights={a: 1, b: 0.5}", "data.samples=10"],
        [TABLE, "data.root=rows"],
        ["model=rnn_text", TABLE, "data.root=table", "data.text_column=text", "data.label_column=label"],
        ["model=transformer", "data=text", "data.root=rows"],
        ["model=transformer", "data=text", "data.root=shape/config.json"],
        ["data=image_folder", "data.root=rows"],
        [HF, "data=text", "model.folder=whole"],
        [HF, "data=text", "model.folder=shape", "model.pretrained=false"],
        ["finetune.init_from=x", "finetune.new=[head]", 'finetune.freeze=["*"]', "finetune.train=[head]"],
        ["finetune.init_from=x", "finetune.new=[head.1]", "finetune.lora_rank=4", "finetune.train=[head]"],
        ["finetune.init_from=x", "finetune.new=[head]", "finetune.lora_rank=4", 'finetune.train=["he*"]'],
        ["finetune.lora_rank=4", "finetune.lora_layers=[query]", "finetune.lora_dropout=0.1"],
    ],
)
def test_valid_arguments_pass(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.config.combinations.find_spec", lambda package: True)  # peft may not be installed
    checked(*overrides)


def test_a_folder_is_not_checked_for_a_job_on_a_cluster(workdir: Path) -> None:
    config = compose(["resources.gpus=0", HF, "model.folder=/scratch/model"], config_dirs=[]).config
    with pytest.raises(UserError, match="no such folder"):
        check(config)
    (workdir / "here").mkdir()
    on_cluster = {**config, "cluster": {"name": "slurm"}}
    assert list(problems_of_parts(on_cluster, workdir)) == []
    with_folder = {**on_cluster, "model": {**config["model"], "folder": "here"}}
    (problem,) = problems_of_parts(with_folder, workdir)
    assert "contains no config.json" in problem.message
