"""A column of images and a column of labels, in tables on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy
import torch

from trainer.data.cache import cache_root, prepared
from trainer.data.class_folders import Reader
from trainer.data.files import SPLITS
from trainer.data.image_folder import ImageFolder, read_image
from trainer.data.images import MAX_PIXELS
from trainer.data.labels import read_labels, refuse_too_many
from trainer.data.row_splits import rows_of_splits
from trainer.data.tables import Tables, pyarrow, record_batches
from trainer.data.untrusted import inside, shown
from trainer.tasks.classification import IGNORED

FORMAT = 1
"""Version of the prepared folder's format, part of its name."""


class Row(NamedTuple):
    """Reference to a row of a file."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{shown(self.path)}:{self.number}"


class LabelledRows(Sequence[tuple[Row, int]]):
    """Rows of several files and their labels, created when indexed.

    Args:
        paths: The files.
        ends: For each file, the number of rows up to its end.
        labels: Labels of all rows, shape `(rows,)`.
        numbers: The rows that are selected; None: all.
    """

    def __init__(
        self, paths: Sequence[Path], ends: numpy.ndarray, labels: numpy.ndarray, numbers: numpy.ndarray | None = None
    ) -> None:
        self.paths, self.ends, self.labels = list(paths), ends, labels
        self.numbers = numpy.arange(len(labels)) if numbers is None else numbers

    def at(self, numbers: numpy.ndarray) -> LabelledRows:
        """Return only these rows."""
        return LabelledRows(self.paths, self.ends, self.labels, numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        number = int(self.numbers[index])
        file = int(numpy.searchsorted(self.ends, number, side="right"))
        return Row(self.paths[file], number - (int(self.ends[file - 1]) if file else 0)), int(self.labels[number])


class ImageColumn:
    """Reads the encoded image in a row; a file is opened in the process that reads it.

    Args:
        root: Folder that paths in the column are relative to.
        column: Name of the column.
        opened_as: File to the Arrow file that holds its rows, if that is another file.
    """

    def __init__(self, root: Path, column: str, opened_as: Mapping[Path, Path]) -> None:
        self.root, self.column, self.opened_as = root, column, dict(opened_as)
        self._columns: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}}

    def __call__(self, row: Row) -> Path | BinaryIO:
        """Return a path or a binary file object of the image.

        Raises:
            ValueError: The row holds no image, or a path outside of the root.
        """
        if row.path not in self._columns:
            arrow = pyarrow()
            batches = record_batches(self.opened_as.get(row.path, row.path), self.column)
            chunks = [batch.column(self.column) for batch in batches]
            self._columns[row.path] = arrow.chunked_array(chunks)
        value = self._columns[row.path][row.number].as_py()
        if isinstance(value, dict):  # the feature Image of `datasets`
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return inside(self.root, value)
        if not isinstance(value, bytes):
            raise ValueError(f"expected an image, got {'null' if value is None else type(value).__name__}")
        return BytesIO(value)


class ImageTable(ImageFolder):
    """Labelled images in tables on disk.

    Batches: `(batch, 3, size, size)` float32, with `grey` `(batch, 1, size, size)`, and `(batch,)` int64 classes.

    Args:
        tables: The files.
        image: Column of images.
        label: Column of classes.
        batch_size: Global batch size.
        num_workers: Worker processes per rank that decode images.
        size: Height and width of an image in pixels.
        augment: Random crops, and horizontal flips with `mirror`.
        grey: Read greyscale images.
        mirror: Random horizontal flips with `augment`.
        held_out: Fraction of the rows for each of val and test that no file gives.
        max_bad: Rows with an unreadable image or without a usable label that are tolerated.
        cache: Folder for rows that come as Parquet; None: `~/.cache/trainer`.
        max_pixels: As in `ImageFolder`.
    """

    def __init__(
        self,
        tables: Tables,
        image: str,
        label: str,
        *,
        batch_size: int,
        num_workers: int,
        size: int,
        augment: bool,
        grey: bool,
        mirror: bool,
        held_out: float,
        max_bad: int,
        cache: str | None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(
            str(tables.root),
            batch_size,
            num_workers=num_workers,
            size=size,
            augment=augment,
            held_out=held_out,
            max_bad=max_bad,
            grey=grey,
            mirror=mirror,
            max_pixels=max_pixels,
        )
        self.tables, self.image, self.label = tables, image, label
        self.cache = Path(cache).expanduser() if cache else cache_root()

    def prepare_data(self) -> None:
        """Convert Parquet to Arrow, in which single rows can be read. Runs on one rank of each node."""
        self._opened_as()

    def reader(self, training: bool) -> tuple[Reader, bool]:
        """Return the function that reads a row, and whether it is random."""
        random = training and self.augment
        column = ImageColumn(self.tables.root, self.image, self._opened_as())
        return partial(_read_row, column=column, random=random, **self._reading()), random

    def _parts(self) -> dict[str, Sequence[tuple[Any, int]]]:
        labels = read_labels(self.tables, self.label)
        self.classes = labels.classes
        parts = rows_of_splits({split: len(one) for split, one in labels.numbers.items()}, self.held_out)
        all_rows = {
            split: LabelledRows(self.tables.files[split], labels.ends[split], one)
            for split, one in labels.numbers.items()
        }
        for split, rows in all_rows.items():
            unlabelled = rows.at(numpy.flatnonzero(rows.labels == IGNORED))
            refuse_too_many(
                split,
                len(unlabelled),
                [str(unlabelled[index][0]) for index in range(min(20, len(unlabelled)))],
                self.max_bad,
            )
        return {split: all_rows[parts[split][0]].at(parts[split][1]) for split in SPLITS}

    def _opened_as(self) -> dict[Path, Path]:
        paths = [path for files in self.tables.files.values() for path in files if path.suffix == ".parquet"]
        if not paths:
            return {}
        names = {path: f"{number:05d}.arrow" for number, path in enumerate(paths)}

        def prepare(folder: Path) -> None:
            for path, name in names.items():
                _write_arrow(path, self.image, folder / name, self.tables.max_bytes)

        folder = prepared(self.cache / f"table-{self.tables.key(FORMAT, 'pictures', self.image)}", prepare)
        return {path: folder / name for path, name in names.items()}


def _read_row(row: Row, *, column: ImageColumn, **reading: Any) -> torch.Tensor:
    return read_image(column(row), **reading)


def _write_arrow(source: Path, column: str, target: Path, max_bytes: int | None) -> None:
    arrow = pyarrow()
    writer = None
    with arrow.OSFile(str(target), "wb") as file:
        for batch in record_batches(source, column, max_bytes):
            writer = writer or arrow.ipc.new_file(file, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
