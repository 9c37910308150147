"""Starting from weights that are there, and training a part of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.config.schema import FineTuneOptions
from trainer.core.errors import UserError
from trainer.models.resnet import ResNet
from trainer.models.transformer import Transformer
from trainer.tasks.classification import Classification
from trainer.train.fine_tuning import load_initial_weights, prepare


def task(classes: int = 4, seed: int = 0) -> Classification:
    torch.manual_seed(seed)
    return Classification(ResNet([1, 8, 8], classes, depth=None, layers=[1, 1], width=4, stem="small"))


def trained(module: nn.Module) -> set[str]:
    return {name for name, one in module.named_parameters() if one.requires_grad}


def checkpoint(folder: Path, module: nn.Module) -> Path:
    store = CheckpointStore(folder)
    state = {"state_dict": module.state_dict(), "optimizer_states": []}
    CheckpointWriter(store, asynchronous=False).save(state, store.path(7), CommitInfo(step=7))
    return store.path(7)


def as_checkpoint(folder: Path, module: Classification) -> Path:
    return checkpoint(folder, module)


def as_safetensors(folder: Path, module: Classification) -> Path:
    save_file(module.state_dict(), folder / "model.safetensors")
    return folder


def as_weights_of_the_network(folder: Path, module: Classification) -> Path:
    save_file(module.model.state_dict(), folder / "network.safetensors")
    return folder / "network.safetensors"


def as_lightning(folder: Path, module: Classification) -> Path:
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_a_compiled_module(folder: Path, module: Classification) -> Path:
    return as_lightning(folder, nn.ModuleDict({"model": torch.compile(module.model, backend="eager")}))  # type: ignore[arg-type, dict-item]


WRITERS = [as_checkpoint, as_safetensors, as_weights_of_the_network, as_lightning, as_a_compiled_module]


@pytest.mark.parametrize("write", WRITERS)
def test_starts_from_every_kind_of_weights(write: object, tmp_path: Path) -> None:
    source, module = task(seed=1), task(seed=2)
    path = write(tmp_path, source)  # type: ignore[operator]
    load_initial_weights(module, FineTuneOptions(init_from=str(path)), log=False)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_new_output_layer_must_be_asked_for(tmp_path: Path) -> None:
    path = str(checkpoint(tmp_path, task(classes=4, seed=1)))
    module = task(classes=3)
    with pytest.raises(
        UserError, match=r"head\.weight is \(4, 8\) in the file and \(3, 8\) in the model.*\n.*finetune\.new"
    ):
        load_initial_weights(module, FineTuneOptions(init_from=path), log=False)
    head = module.model.get_submodule("head").weight.clone()
    load_initial_weights(module, FineTuneOptions(init_from=path, new=["head"]), log=False)
    assert torch.equal(module.model.get_submodule("head").weight, head)
    assert torch.equal(module.state_dict()["model.stem.0.weight"], task(seed=1).state_dict()["model.stem.0.weight"])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"stem\.0\.weight is not in it.*and .* more"):
        load_initial_weights(task(), FineTuneOptions(init_from=str(tmp_path)), log=False)


def test_the_second_name_of_a_tied_weight_may_be_missing(tmp_path: Path) -> None:
    source, module = (Transformer(16, 8, dim=8, layers=1, heads=2) for _ in range(2))
    state = {name: value for name, value in source.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    wrapped = Classification(module)
    load_initial_weights(wrapped, FineTuneOptions(init_from=str(tmp_path)), log=False)
    assert torch.equal(module.head.weight, source.head.weight)


def test_freezing_by_layer_by_pattern_and_back() -> None:
    module = task()
    prepare(module, FineTuneOptions(freeze=["*"], train=["head", "body.1.*.weight"]))
    assert {"model.head.weight", "model.head.bias"} < trained(module)
    assert all(name.startswith(("model.head.", "model.body.1.")) for name in trained(module))
    assert "model.body.1.main.1.bias" not in trained(module)


def test_a_frozen_batch_normalisation_keeps_its_statistics() -> None:
    module = task()
    prepare(module, FineTuneOptions(freeze=["stem"]))
    module.train()
    module(torch.randn(4, 1, 8, 8) + 5)
    state = module.state_dict()
    assert torch.equal(state["model.stem.1.running_mean"], torch.zeros(4))
    assert not torch.equal(state["model.body.0.main.1.running_mean"], torch.zeros(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FineTuneOptions(freeze=["hed"]), "freeze: no parameter of the model matches hed\n  did you mean head"),
        (FineTuneOptions(train=["body.7"]), r"train: no parameter of the model matches body\.7"),
        (FineTuneOptions(freeze=["*"]), "leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant(options: FineTuneOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(task(), options)
