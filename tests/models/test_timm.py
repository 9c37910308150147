"""model=timm hands over what the data says. A stand-in: timm needs torchvision, and the CPU build of torch has none."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from trainer.core.errors import UserError
from trainer.models.timm import create


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    made: list[tuple[str, dict[str, Any]]] = []
    library = ModuleType("timm")

    def create_model(name: str, **named: Any) -> nn.Module:
        made.append((name, named))
        return nn.Identity()

    vars(library).update(
        is_model=lambda name: name == "resnet10t", list_models=lambda: ["resnet10t"], create_model=create_model
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    return made


def test_channels_and_classes_are_those_of_the_data(calls: list[tuple[str, dict[str, Any]]]) -> None:
    create("resnet10t", [1, 28, 28], 10, {"drop_rate": 0.1})
    assert calls == [("resnet10t", {"pretrained": False, "in_chans": 1, "num_classes": 10, "drop_rate": 0.1})]


def test_an_unknown_architecture_is_named_with_the_near_one(calls: list[tuple[str, dict[str, Any]]]) -> None:
    with pytest.raises(UserError, match=r"did you mean model\.architecture=resnet10t"):
        create("resnet10", [1, 28, 28], 10)
    assert calls == []


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        create("resnet10t", [1, 28, 28], 10)
