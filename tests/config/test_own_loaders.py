"""A model with its own loaders needs no data module, and is never silently trained on the default data."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checks.config import check
from trainer.config.compose import Composed, compose
from trainer.core.errors import UserError

MODULES = """
import lightning.pytorch as pl
from somewhere import Unknown

class Plain(pl.LightningModule):
    pass

class Own(pl.LightningModule):
    def train_dataloader(self):
        return []

class Inherits(Own):
    pass

class Maybe(Unknown):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULES)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    for name in ("Plain", "Own", "Inherits", "Maybe"):
        (tmp_path / "conf" / "model" / f"{name.lower()}.yaml").write_text(f"_target_: mine.{name}\n")
    (tmp_path / "conf" / "data").mkdir()
    (tmp_path / "conf" / "data" / "rows.yaml").write_text("_target_: mine.Plain\n")
    return tmp_path


def made(folder: Path, *overrides: str) -> Composed:
    return compose(["tracking=none", *overrides], config_dirs=[], cwd=folder)


@pytest.mark.parametrize("overrides", [["model=own"], ["model=inherits"], ["model._target_=mine.Own"]])
def test_the_models_loaders_are_used_if_no_data_was_chosen(folder: Path, overrides: list[str]) -> None:
    job = made(folder, *overrides)
    assert job.config["data"] == {"_target_": None}
    assert job.choices["data"] == "none"
    assert any("which has a train_dataloader" in note for note in job.notes)
    check(job.config, folder)


def test_the_global_batch_of_the_models_loaders_can_be_set(folder: Path) -> None:
    assert made(folder, "model=own", "data.batch_size=16").config["data"] == {"_target_": None, "batch_size": 16}


@pytest.mark.parametrize(
    ("overrides", "target"),
    [
        (["model=own", "data=rows"], "mine.Plain"),
        (["model=own", "data=digits"], "trainer.data.digits.Digits"),
        (["model=plain"], "trainer.data.digits.Digits"),
        (["model=maybe"], "trainer.data.digits.Digits"),
        (["model=mlp"], "trainer.data.digits.Digits"),
    ],
)
def test_chosen_data_takes_precedence(folder: Path, overrides: list[str], target: str) -> None:
    job = made(folder, *overrides)
    assert job.config["data"]["_target_"] == target
    assert not any("train_dataloader" in note for note in job.notes)


@pytest.mark.parametrize(("model", "refused"), [("plain", True), ("mlp", True), ("own", False), ("maybe", False)])
def test_data_none_needs_a_model_with_loaders(folder: Path, model: str, refused: bool) -> None:
    config = made(folder, f"model={model}", "data=none").config
    if refused:
        with pytest.raises(UserError, match=r"data=none: \w+ has no train_dataloader of its own"):
            check(config, folder)
    else:
        check(config, folder)


def test_a_class_may_have_the_name_of_its_base(folder: Path) -> None:
    (folder / "same.py").write_text("from mine import *\n\nclass Own(Own):\n    pass\n")
    assert made(folder, "model._target_=same.Own", "data=rows").config["data"]["_target_"] == "mine.Plain"
    check(made(folder, "model._target_=same.Own", "data=rows").config, folder)
