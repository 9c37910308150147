"""Prediction rows of several ranks, merged into one file: whatever `predict_step` returns."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from trainer.core import records
from trainer.core.errors import UserError
from trainer.train.predict import PredictionCallback, _size_of
from trainer.train.prediction_writer import PredictionWriter, Shares, merge_shares

Pair = namedtuple("Pair", ["mean", "spread"])


@dataclass
class Boxes:
    boxes: torch.Tensor
    labels: list[str]


def written(folder: Path, rank: int, batches: list[Any], sizes: list[int | None] | None = None) -> PredictionWriter:
    rows = PredictionWriter(folder / ".parts" / str(rank))
    try:
        for outputs, size in zip(batches, sizes or [None] * len(batches), strict=True):
            rows.add(outputs, size)
    finally:
        rows.close()
    return rows


def put_together(
    folder: Path, *ranks: PredictionWriter, num_samples: int | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The record, and the content of each file as plain values."""
    by_batch = frozenset().union(*(rows.by_batch for rows in ranks))
    layouts = [rows.layout for rows in ranks]
    shares = Shares(folder / ".parts", layouts, by_batch)
    outputs = merge_shares(shares, folder, {"": num_samples}, writes=True)
    record = {name: records.to_json(output) for name, output in outputs.items()}
    content = {}
    for name, output in record.items():
        path = folder / output["file"]
        is_array = path.suffix == ".npy"
        content[name] = (
            numpy.load(path).tolist() if is_array else [json.loads(line) for line in path.read_text().splitlines()]
        )
    return record, content


def test_tensors_and_plain_values_keep_their_order(tmp_path: Path) -> None:
    first = [{"logits": torch.arange(6.0).view(3, 2), "text": ["a", "b", "c"]}]
    second = [
        {"logits": torch.full((1, 2), 8, dtype=torch.float32), "text": ["d"]},
        {"logits": torch.full((1, 2), 9, dtype=torch.float32), "text": [{"e": 1}]},
    ]
    ranks = [written(tmp_path, rank, batches) for rank, batches in enumerate((first, second))]
    record, content = put_together(tmp_path, *ranks, num_samples=5)
    assert content["logits"] == [[0, 1], [2, 3], [4, 5], [8, 8], [9, 9]]
    assert content["text"] == ["a", "b", "c", "d", {"e": 1}]
    assert record["logits"] == {"file": "logits.npy", "rows": 5, "dtype": "<f4", "shape": [5, 2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits.npy", "text.jsonl"]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([(torch.ones(2), torch.zeros(2, 1))], {"predictions.0": [1, 1], "predictions.1": [[0], [0]]}),
        ([Pair(torch.ones(2), torch.zeros(2))], {"mean": [1, 1], "spread": [0, 0]}),
        ([{"a": {"b": torch.ones(2), "c": None}}, None], {"a.b": [1, 1]}),
        ([[torch.ones(2), torch.zeros(2), torch.ones(2)]], {f"predictions.{i}": [i % 2 == 0] * 2 for i in range(3)}),
        ([["cat", "dog"]], {"predictions": ["cat", "dog"]}),
        ([numpy.ones((2, 1))], {"predictions": [[1], [1]]}),
        ([[torch.ones(1), torch.ones(3)]], {"predictions": [[1], [1, 1, 1]]}),
        ([[{"b": torch.ones(1, 2)}, {"b": torch.ones(0, 2)}]], {"predictions": [{"b": [[1, 1]]}, {"b": []}]}),
        ([[Boxes(torch.ones(1), ["x"]), "none"]], {"predictions": [{"boxes": [1], "labels": ["x"]}, "none"]}),
        ([torch.ones(2, 2), torch.ones(2, 3)], {"predictions": [[1, 1], [1, 1], [1, 1, 1], [1, 1, 1]]}),
        ([None, None], {}),
    ],
)  # fmt: skip
def test_what_is_returned_is_written_by_sample(tmp_path: Path, batches: list[Any], expected: dict[str, Any]) -> None:
    rows = written(tmp_path, 0, batches, [2] * len(batches))
    record, content = put_together(tmp_path, rows)
    assert content == expected
    assert not any("row" in output for output in record.values())


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([torch.tensor(0.5), torch.tensor(0.25)], [0.5, 0.25]),
        (["whole", "batch"], ["whole", "batch"]),
        # As many boxes as samples in the first batch, by chance.
        ([torch.ones(2, 1), torch.ones(3, 1)], [[[1], [1]], [[1], [1], [1]]]),
        ([["a", "b"], ["a", "b", "c"]], [["a", "b"], ["a", "b", "c"]]),
    ],
)
def test_what_is_not_by_sample_is_one_row_a_batch(tmp_path: Path, batches: list[Any], expected: list[Any]) -> None:
    record, content = put_together(tmp_path, written(tmp_path, 0, batches, [2] * len(batches)), num_samples=99)
    assert content == {"predictions": expected}
    assert record["predictions"]["row"] == "batch"


def test_two_ranks_that_saw_other_shapes_are_one_file(tmp_path: Path) -> None:
    ranks = [written(tmp_path, 0, [torch.ones(2, 2)]), written(tmp_path, 1, [torch.ones(1, 3)])]
    record, content = put_together(tmp_path, *ranks, num_samples=3)
    assert record["predictions"]["file"] == "predictions.jsonl"
    assert content["predictions"] == [[1, 1], [1, 1], [1, 1, 1]]


def test_a_list_that_is_as_long_as_the_last_batch_stays_what_it_was(tmp_path: Path) -> None:
    batches = [[torch.ones(3), torch.zeros(3)], [torch.ones(2), torch.zeros(2)]]
    _, content = put_together(tmp_path, written(tmp_path, 0, batches, [3, 2]), num_samples=5)
    assert content == {"predictions.0": [1] * 5, "predictions.1": [0] * 5}


def test_each_loader_has_rows_of_its_own(tmp_path: Path) -> None:
    callback = PredictionCallback(tmp_path, True, num_loaders=2)
    for loader, size in ((0, 2), (0, 1), (1, 3)):
        batch = [torch.zeros(size, 4)]
        callback.on_predict_batch_end(None, None, {"x": torch.ones(size)}, batch, 0, loader)  # type: ignore[arg-type]
    callback.writer.close()
    assert {name: rows for name, (_, _, rows) in callback.writer.layout.items()} == {
        "dataloader_idx_0.x": 3,
        "dataloader_idx_1.x": 3,
    }


@pytest.mark.parametrize(
    ("batch", "size"), [(torch.zeros(3, 2), 3), ({"a": [torch.zeros(2)]}, 2), (["x", "y"], None), (object(), None)]
)
def test_the_size_of_a_batch_is_lightnings(batch: Any, size: int | None) -> None:
    assert _size_of(batch) == size


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="returned 2 rows as predictions for 3 samples"):
        put_together(tmp_path, written(tmp_path, 0, [torch.zeros(2, 3)]), num_samples=3)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="returned a object in predictions"):
        written(tmp_path, 0, [[object()]])


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    _, content = put_together(tmp_path, written(tmp_path, 0, [torch.tensor([1.5, 2.5], dtype=torch.bfloat16)]))
    assert content == {"predictions": [1.5, 2.5]}
