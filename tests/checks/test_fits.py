"""Pairs of models and data: the check before the launch against networks that are built and run on a batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_every_kind import (
    audio_folder,
    fashion_mnist,
    image_folder,
    image_table,
    text,
    text_classes,
    text_table,
    token_shards,
    token_table,
)
from trainer.checks.config import check
from trainer.checks.fits import FACTS, data_facts, mismatch, model_needs, problems_of_fit
from trainer.config.compose import compose
from trainer.config.instantiate import instantiate, read_plain
from trainer.core.errors import UserError
from trainer.core.paths import conf_dir
from trainer.data.arrays import ArrayDataModule
from trainer.data.digit_strips import DigitStrips
from trainer.data.digits import Digits
from trainer.data.emoji import Emoji
from trainer.data.faces import Faces

Node = dict[str, Any]
Make = Callable[[Path, int], ArrayDataModule]
TINY_GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8}
TINY_BERT = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
TINY_VIT = {"model_type": "vit", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
MODELS: dict[str, tuple[str, Node]] = {
    path.stem: (path.stem, {}) for path in (conf_dir() / "model").glob("*.yaml") if path.stem not in ("hf", "timm")
}
if importlib.util.find_spec("transformers") is not None:
    MODELS["hf causal"] = ("hf", {"config": TINY_GPT2})
    MODELS["hf text"] = ("hf", {"class_name": "AutoModelForSequenceClassification", "config": TINY_BERT})
if importlib.util.find_spec("timm") is not None:
    MODELS["timm"] = ("timm", {"architecture": "resnet18"})
DEEPER = ("resnet34", "resnet101", "resnet152")
"""More of the same blocks as resnet18 and resnet50."""
DATA: dict[str, tuple[str, Node, Make]] = {
    "digits": ("digits", {}, lambda root, _: Digits()),
    "faces": ("faces", {}, lambda root, _: Faces()),
    "fashion_mnist": ("fashion_mnist", {}, fashion_mnist),
    "strips read": ("digit_strips", {}, lambda root, _: DigitStrips(train_samples=40)),
    "strips drawn": ("digit_strips", {"direction": "draw"}, lambda root, _: DigitStrips(direction="draw")),
    "text": ("text", {"sequence_length": 16}, text),
    "token_shards": ("token_shards", {"sequence_length": 16}, token_shards),
    "image_folder": ("image_folder", {"size": 8}, image_folder),
    "audio_folder": ("audio_folder", {"seconds": 0.2, "mels": 8}, audio_folder),
    "table of text": ("hf_dataset", {"sequence_length": 16}, text_table),
    "table of texts with labels": ("hf_dataset", {"sequence_length": 16, "label_column": "odd"}, text_classes),
    "table of ids": ("hf_dataset", {"sequence_length": 8, "ids_column": "input_ids"}, token_table),
    "table of images": ("hf_dataset", {"size": 8}, image_table),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Node, ArrayDataModule, list[torch.Tensor]]]:
    """For each data set: its section of the configuration, the data module, and a batch of two."""
    modules = {}
    for name, (choice, options, make) in DATA.items():
        root = tmp_path_factory.mktemp(choice)
        module = make(root, 0)
        module.prepare_data()
        module.setup("fit")
        module.batch_size = 2
        batch = next(iter(module.train_dataloader()))
        saved = str(root / "saved") if choice == "hf_dataset" else str(root)
        node = read_plain(conf_dir() / "data" / f"{choice}.yaml") | {"root": saved} | options
        modules[name] = (node, module, [one[:2] for one in batch])
    return modules


def trains(node: Node, module: ArrayDataModule, batch: list[torch.Tensor]) -> bool:
    """Return whether the network can be built from the facts and run a first step.

    This happens on the meta device, except for the network that reads the lengths of its sequences.
    """
    device = torch.device("cpu" if "Text" in node["_target_"] else "meta")
    facts = module.facts()
    filled = {key: facts[key] if value is None and key in facts else value for key, value in node.items()}
    try:
        with device:
            task = instantiate({"_target_": module.default_task}, model=instantiate(filled, where="model"))
            task.training_step(tuple(one.to(device) for one in batch), 0)
    except (UserError, TypeError, RuntimeError, ValueError, IndexError, AttributeError, UserWarning):
        return False
    return True


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow) if name in DEEPER else name for name in MODELS]
)
def test_mismatches_are_exactly_the_pairs_that_cannot_train(
    model: str, data: dict[str, tuple[Node, ArrayDataModule, list[torch.Tensor]]]
) -> None:
    choice, options = MODELS[model]
    node = read_plain(conf_dir() / "model" / f"{choice}.yaml") | options
    needs = model_needs(node, Path.cwd())
    assert needs is not None
    for name, (data_node, module, batch) in data.items():
        declared = data_facts(data_node, Path.cwd())
        assert declared is not None, name
        problem = mismatch(needs, declared)
        assert (problem is None) == trains(node, module, batch), (name, problem)


def test_declared_facts_match_the_data(
    data: dict[str, tuple[Node, ArrayDataModule, list[torch.Tensor]]],
) -> None:
    for name, (node, module, _) in data.items():
        declared, facts = data_facts(node, Path.cwd()), module.facts()
        assert declared is not None
        assert declared.task == module.default_task, name
        assert set(declared.facts) == set(facts) & set(FACTS), name
        for key, value in declared.facts.items():
            assert value is None or value == facts[key], (name, key)


def test_declared_facts_of_emoji_match() -> None:
    """The facts do not need its font, which may not be installed."""
    for direction in ("read", "draw"):
        node = {"_target_": "trainer.data.emoji.Emoji", "direction": direction, "side": 16}
        module, declared = Emoji(direction=direction, side=16), data_facts(node, Path.cwd())
        assert declared is not None
        assert (declared.task, set(declared.facts)) == (module.default_task, set(module.facts()))
        assert declared.facts["input_shape"] == module.facts()["input_shape"]


def test_every_shipped_data_set_is_in_the_matrix() -> None:
    known = {choice for choice, _, _ in DATA.values()} | {"emoji", "mixture", "none"}
    assert {path.stem for path in (conf_dir() / "data").glob("*.yaml")} == known


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=transformer"],
            r"model\.vocab_size and model\.sequence_length are null: Transformer needs them, but Digits provides "
            r"input_shape, num_classes\n  models for this data: .*mlp.*; data for this model: text, token_shards",
        ),
        (
            ["model=resnet18", "data=text"],
            r"model\.input_shape .*\n.*transformer.*fashion_mnist",
        ),
        (["model=gpt2_124m"], r"Transformer takes other inputs"),
        (["model=vit_b16"], r"model\.patch=16 does not divide the images of Digits \(8 x 8\)"),
        (["model=vgg16"], r"the images of Digits \(8 x 8\) are too small to be halved by 5 stages of VGG"),
        (["model=gpt2_124m", "data=text", "data.sequence_length=2048"], r"model\.sequence_length=1024: Text has 2048"),
        (
            ["model=mlp", "data=mixture", "data.sources={a: {_target_: trainer.data.text.Text}}"],
            "Text provides vocab_size",
        ),
        (["model=image_to_sequence", "data=digit_strips", "data.direction=draw"], "for the task ImageToSequence"),
    ],
)
@pytest.mark.usefixtures("workdir")
def test_a_mismatch_is_one_problem_with_alternatives(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(compose(["resources.gpus=0", *overrides], config_dirs=[]).config)
    assert "problems in the configuration" not in caught.value.message


USERS = """
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from trainer.data.digits import Digits
from trainer.models.mlp import MLP

class Silent(LightningDataModule):
    pass

class Says(LightningDataModule):
    provides = ("input_shape",)

class Net(nn.Module):
    def __init__(self, vocab_size: int, width: int = 3):
        super().__init__()

class Mine(LightningModule):
    def __init__(self, num_classes: int, lr: float = 0.1):
        super().__init__()

class Wide(MLP):
    pass

class Scans(Digits):
    def facts(self):
        return {"vocab_size": 7, "sequence_length": 64}

class Squares(Digits):
    provides = ("input_shape",)
"""


@pytest.mark.parametrize(
    ("model", "data", "refused"),
    [
        ({"_target_": "mine.Net", "vocab_size": None}, {"_target_": "mine.Silent"}, False),
        ({"_target_": "mine.Net", "vocab_size": None}, {"_target_": "mine.Says"}, True),
        ({"_target_": "mine.Net", "vocab_size": 7}, {"_target_": "mine.Says"}, False),
        ({"_target_": "mine.Mine", "num_classes": None}, {"_target_": "trainer.data.digits.Digits"}, False),
        ({"_target_": "mine.Mine", "num_classes": 3}, {"_target_": "trainer.data.text.Text"}, False),
        ({"_target_": "mine.Mine", "num_classes": None}, {"_target_": "trainer.data.text.Text"}, True),
        ({"_target_": "mine.Wide", "input_shape": None, "num_classes": 2}, {"_target_": "mine.Says"}, False),
        ({"_target_": "mine.Net", "vocab_size": None}, {"_target_": "mine.Scans"}, False),
        ({"_target_": "mine.Net", "vocab_size": None}, {"_target_": "mine.Squares"}, True),
        ({"_target_": "mine.Gone", "x": None}, {"_target_": "trainer.data.text.Text"}, False),
    ],
)
def test_users_classes_without_declarations_pass(workdir: Path, model: Node, data: Node, refused: bool) -> None:
    (workdir / "mine.py").write_text(USERS)
    config = {"model": model, "data": data, "task": {}}
    assert bool(list(problems_of_fit(config, workdir))) == refused


def test_a_task_that_the_user_chose_is_not_checked(workdir: Path) -> None:
    config = compose(["resources.gpus=0", "model=mlp", "data=digits"], config_dirs=[]).config
    config["task"] = {"_target_": "trainer.tasks.language_modelling.LanguageModelling"}
    assert list(problems_of_fit(config, workdir)) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.label_smoothin=0.1"], "Classification takes no argument label_smoothin"),
        (["task.label_smoothing=much"], "task.label_smoothing=much: expected a number"),
        (["experiment=text_transformer", "task.chunked_los=true"], "LanguageModelling takes no argument chunked_los"),
    ],
)
def test_arguments_of_the_default_task_are_checked(overrides: list[str], message: str) -> None:
    config = compose(overrides, config_dirs=[]).config
    problems = [problem.message for problem in problems_of_fit(config, Path.cwd())]
    assert len(problems) == 1
    assert message in problems[0]


def test_arguments_that_the_default_task_takes_pass() -> None:
    config = compose(["task.label_smoothing=0.1"], config_dirs=[]).config
    assert list(problems_of_fit(config, Path.cwd())) == []
