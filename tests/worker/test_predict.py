"""Rows that the ranks wrote, put behind each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from trainer.errors import UserError
from trainer.worker.predict import Layout, RowsWriter, joined


def written(folder: Path, rank: int, batches: list[Any]) -> Layout:
    writer = RowsWriter(folder / ".parts" / str(rank), writes=True)
    try:
        for number, outputs in enumerate(batches):
            writer.on_predict_batch_end(None, None, outputs, None, number)  # type: ignore[arg-type]
    finally:
        writer.close()
    return writer.layout


def test_tensors_and_plain_values_keep_their_order(tmp_path: Path) -> None:
    first = [{"logits": torch.arange(6.0).view(3, 2), "text": ["a", "b", "c"]}]
    second = [
        {"logits": torch.full((1, 2), 8, dtype=torch.float32), "text": ["d"]},
        {"logits": torch.full((1, 2), 9, dtype=torch.float32), "text": [{"e": 1}]},
    ]
    layouts = [written(tmp_path, rank, batches) for rank, batches in enumerate((first, second))]
    outputs = joined(tmp_path / ".parts", layouts, tmp_path, 5, writes=True)
    assert numpy.load(tmp_path / "logits.npy").tolist() == [[0, 1], [2, 3], [4, 5], [8, 8], [9, 9]]
    lines = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert lines == ["a", "b", "c", "d", {"e": 1}]
    assert outputs["logits"] == {"file": "logits.npy", "rows": 5, "dtype": "<f4", "shape": [5, 2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits.npy", "text.jsonl"]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.zeros(())], "returned a Tensor as predictions"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "after rows of"),
        ([torch.zeros(2, 3)], "gave 2 rows as predictions for 3 samples"),
    ],
)
def test_what_is_not_one_row_a_sample_is_refused(tmp_path: Path, batches: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        joined(tmp_path / ".parts", [written(tmp_path, 0, batches)], tmp_path, 3, writes=True)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    layout = written(tmp_path, 0, [torch.tensor([1.5, 2.5], dtype=torch.bfloat16)])
    joined(tmp_path / ".parts", [layout], tmp_path, None, writes=True)
    assert numpy.load(tmp_path / "predictions.npy").tolist() == [1.5, 2.5]
