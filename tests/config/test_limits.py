"""The limits, defaults and descriptions of the fields of the configuration."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest

from trainer.config.cluster import CLUSTERS
from trainer.config.limits import Amount, AtLeast, BatchCount, Limit, MoreThan, OneOf, PositiveInt, limits_of
from trainer.config.schema import (
    CheckpointOptions,
    Config,
    FineTuneOptions,
    ResilienceOptions,
    Resources,
    TrackingOptions,
    TrainerOptions,
)
from trainer.config.strategy import STRATEGIES
from trainer.config.typed import options_of, problems_of

SECTIONS = [
    *(Config, Resources, TrainerOptions, CheckpointOptions, TrackingOptions, ResilienceOptions, FineTuneOptions),
    *STRATEGIES.values(),
    *CLUSTERS.values(),
]


@dataclass
class Declared:
    plain: int = 1
    count: PositiveInt | None = None
    ratio: Annotated[float, MoreThan(0.5)] = 1.0
    batches: Annotated[int | float, BatchCount(allow_zero=True)] | None = None
    choice: Literal["a", "b"] = "a"
    switch: bool | Literal["warn"] = False
    names: list[str] | None = None


def test_limits_are_read_from_the_types_of_fields() -> None:
    assert limits_of(Declared) == {
        "count": AtLeast(1),
        "ratio": MoreThan(0.5),
        "batches": BatchCount(allow_zero=True),
        "choice": OneOf(("a", "b")),
        "switch": OneOf((True, False, "warn")),
    }


@pytest.mark.parametrize(
    ("limit", "valid", "invalid"),
    [
        (AtLeast(1), [1, 2.5], [0, -3, float("nan")]),
        (Amount(), [0, 2.5], [-0.01, float("inf"), float("nan")]),
        (MoreThan(0), [0.1, 7], [0, -1, float("nan")]),
        (BatchCount(allow_zero=False), [1, 7, 0.5, 1.0, 3.0], [0, 0.0, 1.5, -1]),
        (BatchCount(allow_zero=True), [0, 0.0, 2], [2.5, -0.5]),
        (OneOf((True, False, "warn")), [True, False, "warn"], ["wan", None]),
    ],
)
def test_a_limit_accepts_valid_values_only(limit: Limit, valid: list[Any], invalid: list[Any]) -> None:
    assert [limit.problem("section.key", value) for value in valid] == [None] * len(valid)
    for value in invalid:
        problem = limit.problem("section.key", value)
        assert problem is not None, value
        assert problem.message.startswith("section.key=")
        assert problem.fix


def test_the_nearest_choice_is_suggested() -> None:
    problem = OneOf(("online", "offline")).problem("tracking.mode", "ofline")
    assert problem is not None
    assert problem.fix == "did you mean tracking.mode=offline? choose one of: offline, online"


@pytest.mark.parametrize("cls", SECTIONS)
def test_defaults_are_within_the_limits(cls: type) -> None:
    defaults = {field.name: field.default for field in fields(cls)}
    for key, limit in limits_of(cls).items():
        assert defaults[key] is None or limit.problem(key, defaults[key]) is None


@pytest.mark.parametrize("cls", SECTIONS)
def test_every_field_has_a_description(cls: type) -> None:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    for field, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert is_text, ast.unparse(field)


def test_any_string_is_composed_for_a_choice_and_a_list_is_not() -> None:
    """The choice itself is checked with all other values."""
    assert not problems_of("trainer", {"precision": "bf8"})
    (problem,) = problems_of("checkpoint", {"mode": ["min"]})
    assert problem.message == "checkpoint.mode=['min']: expected min or max or null"
    assert problem.fix == "write checkpoint.mode=min"


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (TrainerOptions, {}, "training would never end"),
        (TrainerOptions, {"max_time": "90"}, "expected DD:HH:MM:SS"),
        (CheckpointOptions, {"local_dir": "/scratch"}, "must be set together"),
        (CheckpointOptions, {"local_every_n_steps": 5}, "must be set together"),
        (FineTuneOptions, {"lora_alpha": 8}, "has no effect without"),
    ],
)
def test_a_section_checks_its_own_values(cls: type, options: dict[str, Any], message: str) -> None:
    (problem,) = options_of(cls, options).problems()
    assert message in problem.message


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (TrainerOptions, {"max_steps": 3}),
        (CheckpointOptions, {"local_dir": "/scratch", "local_every_n_steps": 5}),
        (FineTuneOptions, {"lora_rank": 4, "lora_alpha": 8}),
    ],
)
def test_a_valid_section_has_no_problems(cls: type, options: dict[str, Any]) -> None:
    assert not list(options_of(cls, options).problems())
