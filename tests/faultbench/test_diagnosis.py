"""From two traces, written by hand, to the first difference, its likely cause and its effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.faultbench.diagnosis import KINDS, diagnose, steps_per_epoch
from trainer.runs.directory import RunDirectory

BATCHES = 8
KILLED_AT = 4
VALUES: dict[str, dict[str, Any]] = {
    "hash": {"hash of a text": 1},
    "progress": {"epoch": 0, "batch": 0, "step": 0},
    "data": {"batch": 2},
    "parameters": {"net.weight": 3},
    "buffers": {"mean": 4},
    "options": {"0.0.lr": "0.1"},
    "optimizer": {"0": 5},
    "schedulers": {"0 (StepLR).last_epoch": "1"},
    "frozen": {"net.weight": "False"},
    "accumulation": {"accumulate_grad_batches": 1},
    "random": {"torch": 6},
    "callbacks": {"EarlyStopping.wait_count": "0"},
    "attributes": {"count": "7"},
}
"""The inputs of a batch, as `trainer.faultbench.trace` writes them."""


def record(batch: int, changes: dict[str, dict[str, Any]] | None = None, loss: str = "0.5") -> dict[str, Any]:
    inputs = {kind: {**values, **(changes or {}).get(kind, {})} for kind, values in VALUES.items()}
    out = {"loss": loss, "parameters": batch}
    return {"batch": batch, "step": batch + 1, "epoch": 0, "steps_per_epoch": 39, "in": inputs, "out": out}


def write(folder: Path, attempt: int, records: list[dict[str, Any]], rank: int = 0) -> RunDirectory:
    run = RunDirectory(folder)
    path = run.trace_path(attempt, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.attempt_logs(attempt).mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return run


@pytest.fixture
def undisturbed(tmp_path: Path) -> RunDirectory:
    return write(tmp_path / "undisturbed", 0, [record(batch) for batch in range(BATCHES)])


@pytest.fixture
def killed(tmp_path: Path) -> RunDirectory:
    """Its first attempt; the tests write the second, which resumes at batch 3."""
    run = write(tmp_path / "killed", 0, [record(batch) for batch in range(KILLED_AT)])
    with run.trace_path(0, 0).open("a") as file:
        file.write('{"batch": 4, "st')  # truncated by the kill
    return run


def resumed(changes: dict[str, dict[str, Any]], first: int = 3, loss: str = "0.6") -> list[dict[str, Any]]:
    """The records of an attempt with changes at batch `first`, and another loss from then on."""
    return [
        record(batch, changes if batch == first else None, loss if batch >= first else "0.5")
        for batch in range(3, BATCHES)
    ]


def test_equal_traces_have_no_difference(killed: RunDirectory, undisturbed: RunDirectory) -> None:
    write(killed.path, 1, [record(batch) for batch in range(3, BATCHES)])
    assert diagnose(killed, undisturbed) is None
    assert steps_per_epoch(undisturbed) == 39
    assert steps_per_epoch(RunDirectory(killed.path / "nothing")) is None


@pytest.mark.parametrize("kind", KINDS)
def test_each_input_has_its_likely_cause(kind: str, killed: RunDirectory, undisturbed: RunDirectory) -> None:
    name = next(iter(VALUES[kind]))
    write(killed.path, 1, resumed({kind: {name: "9" if isinstance(VALUES[kind][name], str) else 9}}))
    found = diagnose(killed, undisturbed)
    assert found is not None
    assert found.where == f"epoch {9 if kind == 'progress' else 0}, step 4, rank 0, the first batch after resume 1"
    assert found.what.startswith(f"{KINDS[kind][0]}: {name}")
    assert found.reason == KINDS[kind][1]
    assert (found.also, found.effect) == (None, None)


def test_the_cause_comes_before_what_it_changes(killed: RunDirectory, undisturbed: RunDirectory) -> None:
    write(killed.path, 1, resumed({"random": {"torch": 9}, "data": {"batch": 9}, "optimizer": {"0": 9}}, first=5))
    found = diagnose(killed, undisturbed)
    assert found is not None
    assert found.where.endswith("step 6, rank 0, after resume 1")
    assert found.what == "the batch: batch"
    assert found.also == "the optimizer's state: 0; the random number generators: torch"


def test_values_are_shown_and_checksums_are_not(killed: RunDirectory, undisturbed: RunDirectory) -> None:
    write(killed.path, 1, resumed({"attributes": {"count": None}, "accumulation": {"accumulate_grad_batches": 2}}))
    found = diagnose(killed, undisturbed)
    assert found is not None
    assert found.what == "the number of accumulated batches: accumulate_grad_batches is 2 instead of 1"
    assert found.also == "an attribute that is in no checkpoint: count is not set instead of 7"


def test_many_differences_are_counted(killed: RunDirectory, undisturbed: RunDirectory) -> None:
    write(killed.path, 1, resumed({"parameters": {f"layer{number}": number for number in range(5)}}))
    found = diagnose(killed, undisturbed)
    assert found is not None
    assert found.what == "the weights before the batch: layer0, layer1, layer2 and 2 more"


def test_a_later_effect_is_named(killed: RunDirectory, undisturbed: RunDirectory) -> None:
    records = [record(batch, {"attributes": {"count": "0"}} if batch == 3 else None) for batch in range(3, 6)]
    write(killed.path, 1, [*records, record(6, loss="0.6")])
    found = diagnose(killed, undisturbed)
    assert found is not None
    assert found.what == "an attribute that is in no checkpoint: count is 0 instead of 7"
    assert found.effect == "the weights or the loss differ from step 7 on"


def test_another_result_from_equal_inputs_is_nondeterministic(tmp_path: Path, undisturbed: RunDirectory) -> None:
    killed = write(tmp_path / "killed", 0, [record(0, loss="0.6")])
    found = diagnose(killed, undisturbed)
    assert found is not None
    assert (found.where, found.what) == ("epoch 0, step 1, rank 0, before the first kill", "the result")
    assert "trainer.deterministic=true" in found.reason


def test_what_differs_between_any_two_runs_is_ignored(tmp_path: Path, undisturbed: RunDirectory) -> None:
    clock = {"attributes": {"count": "a time"}}
    killed = write(tmp_path / "killed", 0, [record(batch, clock) for batch in range(KILLED_AT)])
    write(killed.path, 1, [record(batch, clock) for batch in range(3, BATCHES)])
    assert diagnose(killed, undisturbed) is None


def test_the_earliest_difference_of_all_ranks_is_named(killed: RunDirectory, undisturbed: RunDirectory) -> None:
    write(undisturbed.path, 0, [record(batch) for batch in range(BATCHES)], rank=1)
    write(killed.path, 1, resumed({"data": {"batch": 9}}, first=5))
    write(killed.path, 1, resumed({"buffers": {"mean": 9}}, first=4), rank=1)
    found = diagnose(killed, undisturbed)
    assert found is not None
    assert (found.where, found.what) == ("epoch 0, step 5, rank 1, after resume 1", "a buffer: mean")
