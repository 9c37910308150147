"""Jobs with what users' modules and callbacks do: killed and resumed, equal to the unharmed one and to Lightning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.documentation import documented
from tests.train import resumed_job
from trainer.checkpoint.store import CheckpointStore
from trainer.core.errors import DONE, NEVER_RESTART

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process for all: a job takes a tenth of a second there, and importing what it needs takes three."""
    folder = tmp_path_factory.mktemp("resumed")
    done = subprocess.run(
        [sys.executable, resumed_job.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", resumed_job.CASES)
def test_a_killed_job_ends_as_the_one_that_was_not_and_as_with_lightning(name: str, results: Path) -> None:
    assert json.loads((results / f"{name}.json").read_text()) == []


def test_the_final_checkpoint_has_the_averaged_weights_and_the_state_before_is_kept(results: Path) -> None:
    folder = results / "averaging_at_the_end" / "unharmed" / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    assert kept[-2:] == ["step-00000012", "step-00000012-before-end"]
    final, before = [torch.load(folder / name / "state.pt", weights_only=True) for name in kept[-2:]]
    average = before["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    assert average
    assert all(torch.equal(final["state_dict"][key], average[key]) for key in average)
    assert not torch.equal(final["state_dict"]["net.0.weight"], before["state_dict"]["net.0.weight"])
    store = CheckpointStore(folder)
    assert store.committed()[-1].path.name == "step-00000012"
    newest, _ = store.newest_good()
    assert newest is not None
    assert newest.is_before_end


@pytest.mark.parametrize(
    ("name", "step", "value"),
    [
        ("best_acc_named", 8, 0.9),
        ("best_loss_named", 4, 0.5),
        ("best_mode_given", 8, 0.9),
        ("best_found", 4, 0.5),
        ("best_found_score", 8, 0.9),
        ("best_nan_first", 8, 0.4),
        ("best_equal", 4, 0.4),
        ("best_rarely", 4, 0.5),
        ("best_higher", 4, 1.0),
    ],
)
def test_the_best_weights_are_on_disk(name: str, step: int, value: float, results: Path) -> None:
    found = json.loads((results / f"{name}.json").read_text())
    if name == "best_rarely":  # the final one is saved anyway, and is better
        step, value = 12, 0.7
        assert found["steps"] == [12]
    else:
        assert found["steps"] == [step, 12]
    assert found["best"]["step"] == found["chosen"] == step
    assert found["best"]["value"] == pytest.approx(value)
    assert found["exit_code"] == DONE


def test_of_several_loaders_the_first_says_which_is_best(results: Path) -> None:
    found = json.loads((results / "best_first_loader.json").read_text())
    assert found["best"]["metric"] == "val_loss/dataloader_idx_0"
    assert found["best"]["step"] == found["chosen"]


def test_without_a_validation_a_metric_of_training_that_is_named_counts(results: Path) -> None:
    found = json.loads((results / "best_of_training.json").read_text())
    assert found["best"]["metric"] == "train_loss_epoch"
    assert found["best"]["step"] in found["steps"]


@pytest.mark.parametrize("name", ["best_unknown", "best_without_any"])
def test_where_nothing_tells_the_last_is_taken(name: str, results: Path) -> None:
    found = json.loads((results / f"{name}.json").read_text())
    assert (found["best"], found["steps"], found["chosen"]) == (None, [12], 12)


def test_what_is_not_saved_is_not_called_best(results: Path) -> None:
    found = json.loads((results / "best_not_saved.json").read_text())
    assert found["steps"] == [12]
    assert found["best"]["step"] == found["chosen"] == 12


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("best_no_direction", ["checkpoint.monitor=energy", "write checkpoint.mode=min or checkpoint.mode=max"]),
        ("best_not_logged", ["the first validation did not log it", "did you mean checkpoint.monitor=val_loss?"]),
    ],
)
def test_a_metric_that_cannot_say_it_ends_the_run_once(name: str, words: list[str], results: Path) -> None:
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    assert found["exit_code"] == NEVER_RESTART
    assert all(word in found["reason"] for word in words), found["reason"]


@pytest.mark.parametrize(
    ("name", "where", "what", "reason"),
    [
        (
            "cause_attribute",
            "step 7, rank 0, the first batch after resume 1",
            "count is not set instead of 6",
            "buffer",
        ),
        ("cause_unstable", "step 1, rank 0, before the first kill", "the result", "trainer.deterministic=true"),
        ("cause_weights", "step 7, rank 0, the first batch after resume 1", "net.0.weight", "when training starts"),
        ("cause_options", "step 7, rank 0, the first batch after resume 1", "0.0.lr is 0.05 instead of", "schedule"),
        ("cause_data", "step 7, rank 0, the first batch after resume 1", "the batch", "iterable dataset"),
    ],
)
def test_what_differs_first_is_named(name: str, where: str, what: str, reason: str, results: Path) -> None:
    found = json.loads((results / f"{name}.json").read_text())
    assert where in found["where"]
    assert what in found["what"]
    assert reason in found["reason"]
    assert ("deterministic" in found["reason"]) == (name == "cause_unstable")
    if name == "cause_attribute":
        assert found["effect"] == "the weights or the loss differ from step 8 on"
        difference = documented("reliability.md", "first difference: ")
        assert difference.shows(f"first difference: {found['where']}: {found['what']} effect: {found['effect']}")
    if name == "cause_options":
        assert "ChangesTheRate.batches is 1 instead of 7" in found["also"]


def test_equal_jobs_have_no_cause(results: Path) -> None:
    assert json.loads((results / "cause_none.json").read_text()) is None
