"""1,797 real scans of handwritten digits, 8x8 grey, which come inside scikit-learn's wheel.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), the test part of it.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.arrays import ArrayDataModule, Arrays, stratified_split

SPLIT_SEED = 0


class Digits(ArrayDataModule):
    """Batches of (n, 1, 8, 8) float32 in 0..1 and (n,) int64; 70 / 15 / 15 % train / val / test, always the same."""

    default_task = "trainer.tasks.classification.Classification"

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__(batch_size)

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        from sklearn.datasets import load_digits

        scans = load_digits()
        inputs = torch.from_numpy(scans.images).float().div(16).unsqueeze(1)
        targets = torch.from_numpy(scans.target).long()
        parts = [torch.from_numpy(ids) for ids in stratified_split(scans.target, [0.7, 0.15], SPLIT_SEED)]
        self.train, self.val, self.test = (Arrays(inputs[ids], targets[ids]) for ids in parts)

    def facts(self) -> dict[str, Any]:
        return {"input_shape": [1, 8, 8], "num_classes": 10}
