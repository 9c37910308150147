"""The tasks: metrics that are exact over ranks, a lean training step, schedules."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

from trainer import schedules
from trainer.data.digits import Digits
from trainer.data.loader import evaluation
from trainer.models.mlp import MLP
from trainer.tasks.base import Task
from trainer.tasks.classification import Classification
from trainer.tasks.image_to_sequence import ImageToSequence
from trainer.tasks.language_modelling import LanguageModelling
from trainer.tasks.sequence_to_image import SequenceToImage


def evaluate(task: Task, loader: Any) -> dict[str, float]:
    """What a validation logs, without a Lightning Trainer around it."""
    logged: dict[str, float] = {}
    task.log_dict = lambda values: logged.update({key: float(value) for key, value in values.items()})  # type: ignore[method-assign]
    task.eval()
    with torch.no_grad():
        task.on_validation_epoch_start()
        for index, batch in enumerate(loader):
            task.validation_step(batch, index)
        task.on_validation_epoch_end()
    return logged


def digits_on(rank: int, world_size: int) -> dict[str, float]:
    data = Digits()
    data.setup()
    torch.manual_seed(0)
    return evaluate(Classification(MLP([1, 8, 8], 10)), evaluation(data.val_dataloader(), rank, world_size))


def _rank(rank: int, world_size: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(digits_on(rank, world_size)))
    finally:
        distributed.destroy_process_group()


def test_validation_on_two_ranks_equals_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (2, tmp_path), nprocs=2)
    alone = digits_on(0, 1)
    assert alone.keys() == {"val/loss", "val/acc"}
    for rank in (0, 1):
        found = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert found["val/acc"] == alone["val/acc"]
        assert found["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-6)


class Fixed(nn.Module):
    """The same logits for every input."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*inputs.shape, -1)


def test_classification_counts_samples_not_batches() -> None:
    batches = [(torch.zeros(3), torch.tensor([0, 0, 0])), (torch.zeros(1), torch.tensor([1]))]
    found = evaluate(Classification(Fixed([math.log(3), 0.0])), batches)
    assert found["val/acc"] == 0.75
    assert found["val/loss"] == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4)


def test_label_smoothing_is_for_training_only() -> None:
    batch = torch.zeros(2), torch.tensor([0, 1])
    plain, smooth = (Classification(Fixed([2.0, 0.0]), label_smoothing=value) for value in (0.0, 0.2))
    assert evaluate(plain, [batch]) == evaluate(smooth, [batch])
    batch = torch.zeros(1), torch.tensor([0])
    assert smooth.training_step(batch, 0) > plain.training_step(batch, 0)


def test_language_modelling_metrics_of_a_uniform_model() -> None:
    task = LanguageModelling(Fixed([0.0] * 16), bytes_per_token=2.0)
    tokens = torch.tensor([[0, 1, 2], [0, 0, -100]])
    found = evaluate(task, [(torch.zeros(2, 3, dtype=torch.long), tokens)])
    assert found["val/loss"] == pytest.approx(math.log(16))
    assert found["val/ppl"] == pytest.approx(16)
    assert found["val/bpb"] == pytest.approx(2)
    assert found["val/acc"] == pytest.approx(3 / 5)
    assert task.training_step((tokens.clamp(0), tokens), 0).item() == pytest.approx(math.log(16))


class Counts(nn.Module):
    """Reads 1, 2, 3, ... whatever the image: each token is the one before it and 1."""

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return 50.0 * nn.functional.one_hot(tokens + 1, 8).float()


def test_image_to_sequence_is_right_when_all_of_it_is_read_out_right() -> None:
    """The second image's 4 follows the right token before it, but not the one that was read out."""
    tokens = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 1, 7]])
    targets = torch.tensor([[1, 2, 3], [3, 4, 5], [1, -100, -100]])
    found = evaluate(ImageToSequence(Counts()), [(torch.zeros(3, 1, 2, 2), tokens.clamp(max=6), targets)])
    assert found["val/exact"] == pytest.approx(2 / 3)
    assert found["val/loss"] == pytest.approx(50 / 7)


def test_sequence_to_image_explains_nothing_by_the_mean_and_all_by_the_image() -> None:
    images = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    for logits, loss, explained in ((1.5, 1.25, 0.0), (None, 0.0, 1.0)):
        model = nn.Identity() if logits is None else Fixed([logits])
        tokens = images if logits is None else torch.zeros(2, 2)
        task = SequenceToImage(model)
        batches = (
            [(tokens[row], images[row]) for row in (0, 1)]
            if logits is None
            else [(tokens[row], images[row][:, None]) for row in (0, 1)]
        )
        found = evaluate(task, batches)
        assert found["val/loss"] == pytest.approx(loss)
        assert found["val/explained"] == pytest.approx(explained)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_named_by_stage(stage: str) -> None:
    task = Classification(Fixed([1.0, 0.0]))
    logged: dict[str, Any] = {}
    task.log_dict = logged.update  # type: ignore[method-assign]
    task.validation_step((torch.zeros(1), torch.zeros(1, dtype=torch.long)), 0)
    task.on_validation_epoch_end() if stage == "val" else task.on_test_epoch_end()
    assert logged.keys() == {f"{stage}/loss", f"{stage}/acc"}


def rates(schedule: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)


def test_cosine_warms_up_and_ends_at_its_ratio() -> None:
    found = rates(schedules.cosine(sgd(), total_steps=20, warmup_steps=4, min_ratio=0.1), 21)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[4] == 2.0
    assert found[12] == pytest.approx(1.1)
    assert found[20] == pytest.approx(0.2)


def test_a_warm_up_longer_than_the_job_is_cut() -> None:
    found = rates(schedules.cosine(sgd(), total_steps=10, warmup_steps=50), 10)
    assert max(found) == 2.0


def test_schedules_resume() -> None:
    whole = schedules.cosine(sgd(), 20, 4, 0.1)
    first = schedules.cosine(sgd(), 20, 4, 0.1)
    expected = rates(whole, 20)
    assert rates(first, 7) == expected[:7]
    resumed = schedules.cosine(sgd(), 20, 4, 0.1)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(resumed, 13) == expected[7:]


def test_constant() -> None:
    assert rates(schedules.constant(sgd(), 10, 2), 5) == [1.0, 2.0, 2.0, 2.0, 2.0]
