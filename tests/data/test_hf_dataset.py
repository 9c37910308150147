"""Tables on disk: which splits, columns and classes are taken, and what is said of rows and folders that are bad."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
import torch

from tests.data.saved_tables import images, png, save_parquet, save_splits, save_to_disk
from trainer.core.errors import UserError
from trainer.data.class_folders import LabelledFiles
from trainer.data.hf_dataset import hf_dataset
from trainer.data.image_folder import read_image
from trainer.data.row_splits import rows_of_splits
from trainer.data.tables import find_tables
from trainer.data.text_table import TextTable, TokenTable
from trainer.data.tokens import TokenWindows
from trainer.tasks.classification import IGNORED

CLASSES = {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}


def stream(data: Any, split: str = "train") -> numpy.ndarray:
    found = getattr(data, split)
    assert isinstance(found, TokenWindows)
    return found.files[0]


def labelled(data: Any, split: str = "train") -> LabelledFiles:
    found = getattr(data, split)
    assert isinstance(found, LabelledFiles)
    return found


def opened(root: Path, **options: Any) -> Any:
    data = hf_dataset(str(root), cache=str(root.parent / "cache"), **options)
    data.prepare_data()
    data.setup("fit")
    return data


def test_rows_that_no_file_gives_are_held_out_and_stay_so_when_rows_are_added() -> None:
    parts = rows_of_splits({"train": 400}, 0.1)
    taken = {split: set(numbers.tolist()) for split, (source, numbers) in parts.items() if source == "train"}
    assert set.union(*taken.values()) == set(range(400))
    assert sum(map(len, taken.values())) == 400
    assert all(20 < len(taken[split]) < 60 for split in ("val", "test"))
    more = rows_of_splits({"train": 500}, 0.1)
    for split, before in taken.items():
        assert before <= set(more[split][1].tolist())
    given = rows_of_splits({"train": 400, "val": 7}, 0.1)
    assert given["val"][0] == "val"
    assert set(given["test"][1].tolist()) == taken["test"]
    assert set(given["train"][1].tolist()) == taken["train"] | taken["val"]
    with pytest.raises(UserError, match="leaves no training data"):
        rows_of_splits({"train": 2}, 0.1)


def test_each_row_of_text_is_a_document_and_bad_rows_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ["The first.", None, "  \n", "Nul \0 here.", "The last."]
    splits = {"train": {"text": rows}, "validation": {"text": ["Held out one."]}, "test": {"text": ["And two."]}}
    save_splits(tmp_path / "saved", {**splits, "unsupervised": {"text": ["not asked for"]}})
    data = opened(tmp_path / "saved", sequence_length=4)
    assert isinstance(data, TextTable)
    assert bytes(stream(data).astype(numpy.uint8)) == b"The first.\0The last.\0"
    assert bytes(stream(data, "test").astype(numpy.uint8)) == b"And two.\0"
    said = data.meta["splits"]["train"]
    assert (said["rows"], said["bad"]) == (5, 3)
    first, second = (f"data-0000{shard}-of-00002.arrow" for shard in (0, 1))
    for name in (f"{first}:1 (null)", f"{second}:0 (empty)", f"{second}:1 (binary)"):
        assert name in caplog.text
    assert data.facts() == {"vocab_size": 256, "sequence_length": 4, "bytes_per_token": 1.0}
    assert set(data.baselines("test")) == {"bpb_unigram", "bpb_3gram"}


def test_the_same_text_as_parquet_arrow_or_saved_gives_the_same_tokens(tmp_path: Path) -> None:
    columns = {"body": [f"Row {number}." for number in range(50)], "other": list(range(50))}
    save_to_disk(tmp_path / "saved", columns)
    save_parquet(tmp_path / "parquet" / "data" / "part-0.parquet", columns)
    (tmp_path / "arrow").mkdir()
    table = pyarrow.table(columns)
    path = str(tmp_path / "arrow" / "a.arrow")
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    (tmp_path / "saved" / "cache-0123.arrow").write_text("what shuffle() leaves")
    tokens = [
        opened(tmp_path / name, text_column="body", sequence_length=4, tokenizer="bpe", vocab_size=280)
        for name in ("saved", "parquet", "arrow")
    ]
    for other in tokens[1:]:
        for split in ("train", "val", "test"):
            assert numpy.array_equal(stream(other, split), stream(tokens[0], split))
    assert tokens[0].tokenizer().decode(stream(tokens[0])[:4].tolist()).startswith("Row")


def test_token_ids_are_put_behind_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [[5, 6, 7], [], None, [8], [70_000]]
    for name, count in (("train", 5), ("val", 1), ("test", 1)):
        save_parquet(tmp_path / "ids" / f"{name}-00000-of-00001.parquet", {"input_ids": rows[:count]})
    data = opened(tmp_path / "ids", sequence_length=2)
    assert isinstance(data, TokenTable)
    assert stream(data).tolist() == [5, 6, 7, 8, 70_000]
    assert data.facts() == {"vocab_size": 70_001, "sequence_length": 2}
    assert ":1 (empty)" in caplog.text
    assert ":2 (null)" in caplog.text
    save_to_disk(tmp_path / "negative", {"input_ids": [[1, -1]] * 9})
    with pytest.raises(UserError, match="are no token ids"):
        opened(tmp_path / "negative", sequence_length=2)


def test_images_have_the_classes_that_the_dataset_names(tmp_path: Path) -> None:
    for kind in ("saved", "parquet"):
        splits = {"train": range(12), "test": range(100, 104)}
        columns = {
            name: {"img": images(numbers), "label": [number % 2 for number in numbers]}
            for name, numbers in splits.items()
        }
        if kind == "saved":
            save_splits(tmp_path / kind, columns, CLASSES)
        else:
            for name, one in columns.items():
                save_parquet(tmp_path / kind / name / "0.parquet", one, CLASSES)
        data = opened(tmp_path / kind, size=8, augment=False, num_workers=0, held_out=0.2)
        assert data.facts() == {"input_shape": [3, 8, 8], "num_classes": 3}
        assert data.classes == ["cat", "dog", "emu"]
        assert len(labelled(data)) + len(labelled(data, "val")) == 12
        (tmp_path / "102.png").write_bytes(png(102))
        image, label = labelled(data, "test")[2]
        assert torch.equal(image, read_image(tmp_path / "102.png", 8, random=False))
        assert label == 0
        again = pickle.loads(pickle.dumps(labelled(data, "test")))
        assert torch.equal(again[2][0], image)


def test_labels_may_be_texts_and_a_column_may_hold_paths_or_bare_bytes(tmp_path: Path) -> None:
    numbers = range(9)
    (tmp_path / "paths").mkdir()
    for number in numbers:
        (tmp_path / "paths" / f"{number}.png").write_bytes(png(number))
    kinds = ["dog" if number % 3 else "cat" for number in numbers]
    save_to_disk(tmp_path / "paths", {"file": [f"{number}.png" for number in numbers], "kind": kinds})
    save_to_disk(tmp_path / "bytes", {"file": [png(number) for number in numbers], "kind": kinds})
    for name in ("paths", "bytes"):
        data = opened(tmp_path / name, image_column="file", label_column="kind", size=8, augment=False, held_out=0.2)
        assert data.classes == ["cat", "dog"]
        train = labelled(data)
        assert len(train.files) >= 5
        for index, (row, label) in enumerate(train.files):
            shard_begins = 4 * (row.path.name.startswith("data-00001"))
            number = shard_begins + row.number
            assert label == (number % 3 > 0)
            expected = read_image(tmp_path / "paths" / f"{number}.png", 8, random=False)
            assert torch.equal(train[index][0], expected)


def test_bad_images_and_labels_keep_their_place_and_are_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    column = images(range(10))
    column[0]["bytes"] = column[0]["bytes"][:50]
    column[1] = {"bytes": None, "path": None}
    labels = [0, 1, None, 7, 2, 0, 1, 2, 0, 1]
    splits: dict[str, dict[str, Any]] = {"train": {"image": column, "label": labels}}
    splits["validation"] = {"image": images(range(2)), "label": [0, 1]}
    splits["test"] = {"image": images(range(2)), "label": [-1, -1]}
    save_splits(tmp_path / "saved", splits, CLASSES)
    data = opened(tmp_path / "saved", size=8, max_bad=2, num_workers=0, held_out=0.1)
    assert "test has no labels in column label: skipped" in caplog.text
    assert "train: 2 rows have no usable label" in caplog.text
    assert "data-00000-of-00002.arrow:2, " in caplog.text
    train = labelled(data)
    by_row = {(row.path.name[:10], row.number): index for index, (row, _) in enumerate(train.files)}
    ignored = [index for index, (_, label) in enumerate(train) if label == IGNORED]
    assert ignored == [by_row["data-00000", number] for number in (0, 1, 3)]  # 2 is held out
    assert train.bad == {train.files[index][0] for index in ignored[:2]}
    assert "expected an image, got null" in caplog.text
    with pytest.raises(UserError, match="2 rows have a label that is none of the classes"):
        opened(tmp_path / "saved", size=8, max_bad=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "txt"}, "data.text_column=txt: no such column\n  did you mean data.text_column=te"),
        ({"text_column": "text", "image_column": "image"}, "data.text_column and data.image_column: a job reads"),
        ({"image_column": "text"}, "images .text. but no labels"),
        ({"text_column": "number"}, "column number holds int64, not text"),
        ({"ids_column": "number"}, "holds int64, not lists of token ids"),
        ({"image_column": "text", "label_column": "half"}, "expected classes, got float"),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path: Path, options: dict[str, str], message: str) -> None:
    columns = {"text": ["a text"] * 40, "number": list(range(40)), "half": [0.5] * 40}
    save_to_disk(tmp_path / "saved", columns)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "saved", sequence_length=4, **options)


def test_without_a_usual_name_the_columns_are_listed(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", {"question": ["why"] * 9, "answer": ["so"] * 9})
    with pytest.raises(UserError, match=r"no column has a known name\n.*the columns are answer, question"):
        hf_dataset(str(tmp_path / "saved"))


def test_folders_that_hold_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_tables(tmp_path / "nowhere")
    with pytest.raises(UserError, match=": no Parquet or Arrow file"):
        find_tables(tmp_path)
    save_parquet(tmp_path / "only" / "test.parquet", {"text": ["a"]})
    with pytest.raises(UserError, match="only the splits test"):
        find_tables(tmp_path / "only")
    save_parquet(tmp_path / "only" / "train.parquet", {"text": ["a"]})
    save_parquet(tmp_path / "only" / "more.parquet", {"text": ["a"]})
    with pytest.raises(UserError, match=r"more\.parquet: no split in the name"):
        find_tables(tmp_path / "only")
    save_to_disk(tmp_path / "saved", {"text": ["a"] * 9})
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow is missing"):
        find_tables(tmp_path / "saved")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", {"text": ["a long enough row of text"] * 200}, shards=1)
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow cannot be read"):
        opened(tmp_path / "saved", sequence_length=4)
