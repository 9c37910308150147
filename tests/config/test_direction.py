"""The direction of a metric by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.direction import direction_of
from trainer.config.monitor import problems_of_monitor

MORE = """val/acc val_accuracy ValidationAccuracy acc1 val/top5 valAUROC val/auc val_f1 val_f1_epoch valF1 val/mAP
map_50 val/meanIoU val/dice precision recall@5 ndcg@10 bleu val/rougeL psnr SSIM val/r2 loss_acc val/log_likelihood
val/acc/dataloader_idx_1"""
LESS = """val/loss val_loss valLoss loss test_error error_rate val/mse RMSE mean_absolute_error val_ppl perplexity wer
cer val/fid bpb val/bits_per_byte nll val/cross_entropy acc_loss brier_score neg_log_likelihood
val_loss/dataloader_idx_0"""
NEITHER = "epoch val/energy val_score score lr time tokens val/distance x"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, "max") for name in MORE.split()],
        *[(name, "min") for name in LESS.split()],
        *[(name, None) for name in NEITHER.split()],
    ],
)
def test_direction(name: str, expected: str | None) -> None:
    assert direction_of(name) == expected


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        ("class Net(LightningModule):\n    pass\n", True),
        ("class Base(LightningModule):\n    pass\n\n\nclass Net(Base):\n    pass\n", True),
        ("import torchmetrics\n\n\nclass Net(LightningModule):\n    pass\n", False),
        ("class Net(LightningModule):\n    primary_metric = ('energy', 'min')\n", False),
        ("from elsewhere import Base\n\n\nclass Net(Base):\n    pass\n", False),
    ],
)
def test_a_metric_without_a_direction_is_refused_before_the_launch(
    source: str, is_refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(f"from lightning.pytorch import LightningModule\n{source}")
    config = {"model": {"_target_": "mine.Net"}, "checkpoint": {"monitor": "energy", "mode": None}}
    problems = list(problems_of_monitor(config, tmp_path))
    assert [problem.fix for problem in problems] == ["write checkpoint.mode=min or checkpoint.mode=max"] * is_refused
    assert not list(problems_of_monitor({**config, "checkpoint": {"monitor": "energy", "mode": "max"}}, tmp_path))
