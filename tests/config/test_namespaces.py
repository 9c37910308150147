"""Targets that have another name by now are found, at the prompt and at the call."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.config.instantiate import instantiate, locate
from trainer.config.namespaces import MOVED, canonical, moved
from trainer.config.sources import Definition, find
from trainer.config.targets import problems_of_targets

FAULT = "trainer.resilience.inject.InjectFault"


def test_only_whole_names_are_replaced() -> None:
    assert moved(FAULT) == canonical(FAULT) == "trainer.faultbench.inject.InjectFault"
    assert moved("trainer.resilience.inject") == "trainer.faultbench.inject"
    assert moved("trainer.resilience.injection.Fault") == "trainer.resilience.injection.Fault"
    assert canonical("pytorch_lightning.callbacks.Timer") == "lightning.pytorch.callbacks.Timer"


@pytest.mark.parametrize(("before", "now"), MOVED.items())
def test_every_moved_module_is_where_the_table_says(before: str, now: str) -> None:
    assert find_spec(before.rpartition(".")[0]) is None
    assert import_module(now).__name__ == now


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (FAULT, "trainer.faultbench.inject.InjectFault"),
        ("trainer.resilience.trace.ResumeTrace", "trainer.faultbench.trace.ResumeTrace"),
    ],
)
def test_a_moved_class_is_the_same_at_the_prompt_and_at_the_call(before: str, now: str, tmp_path: Path) -> None:
    assert locate(before) is locate(now)
    definition = find(before, tmp_path)
    assert isinstance(definition, Definition)
    assert f"{definition.module.name}.{definition.node.name}" == now


def test_a_frozen_node_with_a_moved_target_is_checked_and_built(tmp_path: Path) -> None:
    node = {"_target_": FAULT, "kind": "kill", "step": 15, "ranks": [0]}
    assert type(instantiate(node, where="callbacks.kill")) is locate(FAULT)
    overrides = [f"+callbacks.kill._target_={FAULT}", "+callbacks.kill.kind=kill", "+callbacks.kill.ranks=[0]"]
    config = compose(["model=mlp", "data=digits", *overrides], config_dirs=[], cwd=tmp_path).config
    (problem,) = problems_of_targets(config, tmp_path)
    assert str(problem).startswith(f"callbacks.kill.step is missing: {FAULT} needs it")
