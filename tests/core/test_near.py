"""Suggestions for misspelt names."""

from __future__ import annotations

import pytest

from trainer.core.near import did_you_mean, listed, nearest


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("batchsize", ["batch_size", "batches_per_step_size_limit"], "batch_size"),
        ("Batch-Size", ["batch_size"], "batch_size"),
        ("resnet-18", ["resnet18", "resnet34"], "resnet18"),
        ("max_step", ["max_steps", "max_epochs", "max_time"], "max_steps"),
        ("llr", ["lr", "betas", "weight_decay"], "lr"),
        ("optimiser", ["optimizer", "scheduler"], "optimizer"),
        ("xyzzy", ["optimizer", "scheduler"], None),
        ("anything", [], None),
    ],
)
def test_the_nearest_name(name: str, known: list[str], expected: str | None) -> None:
    assert nearest(name, known) == expected


def test_the_first_half_of_a_fix() -> None:
    assert did_you_mean("max_step", ["max_steps"], prefix="trainer.") == "did you mean trainer.max_steps? "
    assert did_you_mean("xyzzy", ["max_steps"]) == ""


def test_names_in_a_line() -> None:
    assert listed([]) == "none"
    assert listed(["b", "a", "b"]) == "a, b"
    assert listed("edcba", limit=3) == "a, b, c and 2 more"
