"""Writes what `datasets.Dataset.save_to_disk` writes (seen with 5.2.0), without that package."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow
from PIL import Image
from pyarrow import parquet


def save_to_disk(
    root: Path, columns: Mapping[str, Any], features: Mapping[str, Any] | None = None, shards: int = 2
) -> None:
    """One split; batches of 7 rows, so that a table has several."""
    root.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(dict(columns))
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        begin, end = (place * len(table) // shards for place in (number, number + 1))
        with pyarrow.OSFile(str(root / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(begin, end - begin), max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0123456789abcdef"}
    (root / "state.json").write_text(json.dumps(state))
    (root / "dataset_info.json").write_text(json.dumps({"features": dict(features or {})}))


def save_splits(root: Path, splits: Mapping[str, Mapping[str, Any]], features: Mapping[str, Any] | None = None) -> None:
    """A DatasetDict."""
    for name, columns in splits.items():
        save_to_disk(root / name, columns, features)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def save_parquet(path: Path, columns: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(dict(columns))
    if features is not None:
        said = json.dumps({"info": {"features": dict(features)}})
        table = table.replace_schema_metadata({"huggingface": said})
    parquet.write_table(table, path, row_group_size=5)


def png(number: int, side: int = 12) -> bytes:
    """An image that belongs to the number."""
    pixels = numpy.random.default_rng(number).integers(0, 256, (side, side, 3), numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def images(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """As the feature Image is stored."""
    return [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
