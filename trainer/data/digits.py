"""1,797 scans of handwritten digits, 8x8 greyscale, which ship in scikit-learn's wheel.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), its test set.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule, Arrays, stratified_split

SPLIT_SEED = 0


class Digits(ArrayDataModule):
    """The digits; 70 / 15 / 15 % train / val / test, always the same split.

    Batches: `(batch, 1, 8, 8)` float32 in 0..1 and `(batch,)` int64 classes.

    Args:
        batch_size: Global batch size.
    """

    default_task = "trainer.tasks.classification.Classification"
    provides: ClassVar[dict[str, Any]] = {"input_shape": [1, 8, 8], "num_classes": 10}

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__(batch_size)

    def setup(self, stage: str | None = None) -> None:
        """Read the scans and build the dataset of each split, once."""
        if self.train is not None:
            return
        table = _read_table()
        inputs = torch.from_numpy(table[:, :-1]).float().div(16).view(-1, 1, 8, 8)
        targets = torch.from_numpy(table[:, -1]).long()
        parts = [torch.from_numpy(ids) for ids in stratified_split(targets.numpy(), [0.7, 0.15], SPLIT_SEED)]
        self.train, self.val, self.test = (Arrays(inputs[ids], targets[ids]) for ids in parts)

    def facts(self) -> dict[str, Any]:
        """Return `input_shape` and `num_classes`."""
        return dict(self.provides)


def _read_table() -> numpy.ndarray:
    """Read the (1797, 65) float64 table behind `sklearn.datasets.load_digits`.

    scikit-learn is not imported, which would cost each rank a second.
    """
    sklearn = find_spec("sklearn")
    if sklearn is None or sklearn.origin is None:
        raise UserError("data=digits needs scikit-learn, which ships the scans", "pip install scikit-learn")
    return numpy.loadtxt(Path(sklearn.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
