"""The group `tracking`: one tracker, several, a file of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config.compose import Composed, compose
from trainer.core.errors import UserError


def composed(*overrides: str, cwd: Path | None = None) -> Composed:
    return compose(["experiment=quickstart", *overrides], config_dirs=[], cwd=cwd)


def chosen(*overrides: str, cwd: Path | None = None) -> tuple[str, list[str]]:
    config = composed(*overrides, cwd=cwd).config
    return config["tracking"]["name"], list(config["logger"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("wandb", [])),
        (["tracking=none"], ("none", [])),
        (["tracking=tensorboard"], ("none", ["tensorboard"])),
        (["tracking=mlflow"], ("none", ["mlflow"])),
        (["tracking=trackio"], ("none", ["trackio"])),
        (["tracking=[wandb,tensorboard]"], ("wandb", ["tensorboard"])),
        (["tracking=[tensorboard,wandb]"], ("wandb", ["tensorboard"])),
        (["tracking=[tensorboard,csv]"], ("none", ["tensorboard", "csv"])),
        (["tracking=tensorboard", "logger=csv"], ("none", ["tensorboard", "csv"])),
        (["tracking=csv", "logger=csv"], ("none", ["csv"])),
        (["logger=csv"], ("wandb", ["csv"])),
    ],
)
def test_each_choice(overrides: list[str], expected: tuple[str, list[str]]) -> None:
    assert chosen(*overrides) == expected


def test_options_are_those_of_the_section_logger() -> None:
    config = composed("tracking=[tensorboard,csv]", "logger.tensorboard.log_graph=true", "logger.csv=null").config
    assert config["logger"]["tensorboard"]["log_graph"] is True
    assert config["logger"]["csv"] is None
    with pytest.raises(UserError, match="flush_logs"):
        composed("tracking=csv", "logger.csv.flush_logs_evry_n_steps=1")


def own(tmp_path: Path, text: str) -> Path:
    (tmp_path / "conf" / "tracking").mkdir(parents=True)
    (tmp_path / "conf" / "tracking" / "mine.yaml").write_text(text)
    return tmp_path


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    cwd = own(tmp_path, "loggers:\n  mine:\n    _target_: my_package.MyLogger\n    url: http://here\n")
    assert chosen("tracking=mine", cwd=cwd) == ("none", ["mine"])
    assert chosen("tracking=[wandb,mine]", cwd=cwd) == ("wandb", ["mine"])


def test_a_file_that_is_one_logger(tmp_path: Path) -> None:
    cwd = own(tmp_path, "_target_: my_package.MyLogger\nurl: http://here\n")
    config: dict[str, Any] = composed("tracking=mine", cwd=cwd).config
    assert config["tracking"]["name"] == "none"
    assert config["logger"] == {"MyLogger": {"_target_": "my_package.MyLogger", "url": "http://here"}}
    with pytest.raises(UserError, match="beside another tracker") as caught:
        composed("tracking=[wandb,mine]", cwd=cwd)
    assert "loggers:\n      MyLogger:" in caught.value.fix


def test_a_file_without_a_name_is_about_wandb(tmp_path: Path) -> None:
    assert chosen("tracking=mine", "logger=csv", cwd=own(tmp_path, "project: x\n")) == ("wandb", ["csv"])


def test_options_of_wandb_that_have_no_effect_are_named() -> None:
    (note,) = composed("tracking=tensorboard", "tracking.project=x").notes
    assert note == "tracking.project: no effect without W&B; to log there as well: tracking=[wandb,tensorboard]"
    assert not composed("tracking=[wandb,tensorboard]", "tracking.project=x").notes


def test_a_wandb_logger_that_is_switched_off_is_named() -> None:
    (note,) = composed("tracking=none", "logger=wandb").notes
    assert note == "logger.wandb: no effect, because tracking.name=none switches W&B off; to log there: tracking=wandb"
    assert len(composed("tracking=tensorboard", "logger=wandb").notes) == 1
    assert not composed("tracking=wandb", "logger=wandb").notes
    assert not composed("tracking=none", "logger=csv").notes
