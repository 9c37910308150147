"""A column of pictures and one of labels, in tables on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy
import torch

from trainer.data.cache import cache_root, prepared
from trainer.data.class_folders import Read
from trainer.data.files import SPLITS
from trainer.data.image_folder import ImageFolder, read_image
from trainer.data.labels import read_labels, refuse_too_many
from trainer.data.row_splits import rows_of_splits
from trainer.data.tables import Tables, pyarrow, record_batches
from trainer.tasks.classification import IGNORED

FORMAT = 1
"""Of the prepared folder; part of its name."""


class Row(NamedTuple):
    """Of a table's file."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


class LabelledRows(Sequence[tuple[Row, int]]):
    """Rows of several files and their labels, made one by one when they are asked for."""

    def __init__(
        self, paths: Sequence[Path], ends: numpy.ndarray, labels: numpy.ndarray, numbers: numpy.ndarray | None = None
    ) -> None:
        """`ends`: number of the row behind each file's last. `labels`: of all rows. `numbers`: those that are meant;
        null: all."""
        self.paths, self.ends, self.labels = list(paths), ends, labels
        self.numbers = numpy.arange(len(labels)) if numbers is None else numbers

    def at(self, numbers: numpy.ndarray) -> LabelledRows:
        """Only these rows."""
        return LabelledRows(self.paths, self.ends, self.labels, numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        number = int(self.numbers[index])
        file = int(numpy.searchsorted(self.ends, number, side="right"))
        return Row(self.paths[file], number - (int(self.ends[file - 1]) if file else 0)), int(self.labels[number])


class ImageColumn:
    """The bytes of the picture in a row. Files are opened in the process that reads them."""

    def __init__(self, root: Path, column: str, opened_as: Mapping[Path, Path]) -> None:
        """`root`: of paths in the column. `opened_as`: file to the Arrow file with its rows, where it is another."""
        self.root, self.column, self.opened_as = root, column, dict(opened_as)
        self._columns: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}}

    def __call__(self, row: Row) -> Path | BinaryIO:
        """Raises ValueError where there is none."""
        if row.path not in self._columns:
            arrow = pyarrow()
            chunks = [batch.column(self.column) for batch in record_batches(self.opened_as.get(row.path, row.path))]
            self._columns[row.path] = arrow.chunked_array(chunks)
        value = self._columns[row.path][row.number].as_py()
        if isinstance(value, dict):  # what `datasets` calls an Image
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return self.root / value
        if not isinstance(value, bytes):
            raise ValueError(f"no picture but {'null' if value is None else type(value).__name__}")
        return BytesIO(value)


class ImageTable(ImageFolder):
    """Batches of (n, 3, size, size) float32 (with `grey` 1 channel) and (n,) int64, as from class folders."""

    def __init__(
        self,
        tables: Tables,
        image: str,
        label: str,
        batch_size: int,
        num_workers: int,
        size: int,
        augment: bool,
        grey: bool,
        mirror: bool,
        held_out: float,
        max_bad: int,
        cache: str | None,
    ) -> None:
        """`image`, `label`: the columns. The rest as in `ImageFolder`; `cache`: for rows that come as Parquet."""
        super().__init__(str(tables.root), batch_size, num_workers, size, augment, held_out, max_bad, grey, mirror)
        self.tables, self.image, self.label = tables, image, label
        self.cache = Path(cache).expanduser() if cache else cache_root()

    def prepare_data(self) -> None:
        """Parquet is written as Arrow, in which a row is read alone. On one rank of each machine."""
        self._opened_as()

    def reader(self, training: bool) -> tuple[Read, bool]:
        random = training and self.augment
        column = ImageColumn(self.tables.root, self.image, self._opened_as())
        read = partial(_read, column=column, size=self.size, random=random, grey=self.grey, mirror=self.mirror)
        return read, random

    def _parts(self) -> dict[str, Sequence[tuple[Any, int]]]:
        labels = read_labels(self.tables, self.label)
        self.classes = labels.classes
        parts = rows_of_splits({split: len(one) for split, one in labels.numbers.items()}, self.held_out)
        every = {
            split: LabelledRows(self.tables.files[split], labels.ends[split], one)
            for split, one in labels.numbers.items()
        }
        for split, rows in every.items():
            bad = rows.at(numpy.flatnonzero(rows.labels == IGNORED))
            refuse_too_many(split, len(bad), [str(bad[at][0]) for at in range(min(20, len(bad)))], self.max_bad)
        return {split: every[parts[split][0]].at(parts[split][1]) for split in SPLITS}

    def _opened_as(self) -> dict[Path, Path]:
        paths = [path for files in self.tables.files.values() for path in files if path.suffix == ".parquet"]
        if not paths:
            return {}
        names = {path: f"{number:05d}.arrow" for number, path in enumerate(paths)}

        def prepare(folder: Path) -> None:
            for path, name in names.items():
                _write_arrow(path, self.image, folder / name)

        folder = prepared(self.cache / f"table-{self.tables.key(FORMAT, 'pictures', self.image)}", prepare)
        return {path: folder / name for path, name in names.items()}


def _read(row: Row, column: ImageColumn, size: int, random: bool, grey: bool, mirror: bool) -> torch.Tensor:
    return read_image(column(row), size, random, grey, mirror)


def _write_arrow(source: Path, column: str, target: Path) -> None:
    arrow = pyarrow()
    writer = None
    with arrow.OSFile(str(target), "wb") as file:
        for batch in record_batches(source, column):
            writer = writer or arrow.ipc.new_file(file, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
