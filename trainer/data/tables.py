"""Tables on disk: what Hugging Face's `datasets` saves, and folders of Parquet or Arrow files.

Finding them imports nothing; reading them needs pyarrow. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.install import pip_install
from trainer.core.near import did_you_mean, listed
from trainer.data.files import SPLITS
from trainer.data.untrusted import limit_bytes, read_object, require_within, shown

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
IDS = ("input_ids",)
IMAGES = ("image", "img", "picture")
LABELS = ("label", "labels", "class", "category")
TEXTS = ("text", "content")
"""Usual names of such columns; the first kind that exists is taken, in this order."""
SUFFIXES = (".parquet", ".arrow")
BESIDE_TABLES = {"state.json", "dataset_info.json", "dataset_dict.json"}
"""Files that `save_to_disk()` writes next to the tables."""
ROWS = 1024
"""Rows of Parquet that are in memory at a time."""
FILE_FORMAT = b"ARROW1"
"""First bytes of the Arrow file format; `datasets` writes the other one, the stream format."""


@dataclass(frozen=True)
class Tables:
    """The files of each split that is given, in the order of their rows; `train` always exists."""

    root: Path
    files: dict[str, list[Path]]
    max_bytes: int | None = None
    """Maximum bytes that a column of a row group, or a record batch, unpacks to; None: half of the free memory."""

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(_schema(self.files["train"][0]).names)

    def class_names(self, label: str) -> list[str] | None:
        """Return the names of a ClassLabel column; None if neither `dataset_info.json` nor the schema has them."""
        first = self.files["train"][0]
        info = first.parent / "dataset_info.json"
        if info.is_file():
            features = _json(info).get("features")
        else:
            info = first
            try:
                metadata = json.loads((_schema(first).metadata or {}).get(b"huggingface", b"{}"))
            except (ValueError, RecursionError) as error:
                raise _damaged(first, error) from None
            features = _at(_at(metadata, "info"), "features")
        names = _at(_at(features, label), "names")
        return None if names is None else class_names(names, info)

    def key(self, *settings: object) -> str:
        """Return a cache key of these files and these settings.

        Files are identified by name, size and modification time: reading all of them only to find
        them in the cache would not pay off.
        """
        stats = [(split, path, path.stat()) for split in SPLITS for path in self.files.get(split, ())]
        files = [
            (split, path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime_ns)
            for split, path, stat in stats
        ]
        return hashlib.sha256(repr((files, settings)).encode()).hexdigest()[:20]


def class_names(names: Any, source: Path) -> list[str]:
    """Return the names of the classes as they are in a JSON file; raises UserError if they are no texts."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problem = f"{shown(source)}: the names of the classes are {shown(repr(names)[:60])}, not a list of texts"
        raise UserError(problem, "save the dataset again")
    return names


def find_tables(root: Path, max_bytes: int | None = None) -> Tables:
    """Find the tables of a folder by file names and by the JSON files next to them.

    Args:
        root: The folder.
        max_bytes: As in `Tables`.

    Raises:
        UserError: The folder holds no tables to train on, or its splits are unclear.
    """
    if not root.is_dir():
        raise UserError(
            f"data.root={root}: no such folder",
            "use a folder that save_to_disk() wrote, or one of *.parquet or *.arrow",
        )
    splits = root / "dataset_dict.json"
    if splits.is_file():
        names = _json(splits).get("splits", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{shown(splits)}: splits is no list of names", "save the dataset again")
        files = {SPLIT_NAMES[name]: _saved(root / name) for name in names if name in SPLIT_NAMES}
    elif (root / "state.json").is_file():
        files = {"train": _saved(root)}
    else:
        files = _plain(root)
    if not files.get("train"):
        problem = f"only the splits {', '.join(sorted(files))}" if files else "no Parquet or Arrow file"
        fix = "use a folder that save_to_disk() wrote, or one of *.parquet or *.arrow, with a training split"
        raise UserError(f"data.root={root}: {problem}", fix)
    return Tables(root, files, max_bytes)


COLUMN_OPTIONS = ("text_column", "ids_column", "image_column", "label_column")
"""Arguments of `hf_dataset` that name a column."""


def require_column(option: str, given: str, columns: Sequence[str]) -> str:
    """Return `given` if it is one of `columns`, else raise UserError."""
    if given not in columns:
        hint = did_you_mean(given, columns, prefix=f"data.{option}=")
        raise UserError(f"data.{option}={given}: no such column", f"{hint}the columns are {listed(columns)}")
    return given


def require_one_kind(columns: Mapping[str, str | None]) -> None:
    """Raise UserError if more than one option names a column; `columns` maps an option to its column."""
    named = [f"data.{option}" for option, column in columns.items() if column is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: a job reads text, token ids or images", "keep one of them")


def pyarrow() -> ModuleType:
    """Import and return the package.

    Raises:
        EnvironmentFault: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentFault("reading tables needs pyarrow", pip_install("datasets")) from error
    package: ModuleType = pyarrow
    return package


def num_rows(path: Path) -> int:
    """Return the number of rows without reading them."""
    if path.suffix == ".parquet":
        try:
            return int(_opened(path).metadata.num_rows)
        except (OSError, ValueError, MemoryError) as error:
            raise _damaged(path, error) from None
    return sum(batch.num_rows for batch in _batches(path))


def record_batches(path: Path, column: str | None = None, max_bytes: int | None = None) -> Iterator[Any]:
    """Yield pyarrow's RecordBatches; those of an Arrow file are views of its memory map.

    Args:
        path: The file.
        column: The only column that is read, if the file has it; None: all.
        max_bytes: As in `Tables`.

    Raises:
        UserError: The file is damaged, or unpacks to more.
    """
    for batch in _batches(path, column, max_bytes):
        chosen = batch.select([column]) if column in batch.schema.names else batch
        if path.suffix != ".parquet":
            try:
                chosen.validate(full=True)  # pyarrow believes lengths, offsets and counts of nulls: it would crash
            except ValueError as error:
                raise _damaged(path, error) from None
        yield chosen


def _batches(path: Path, column: str | None = None, max_bytes: int | None = None) -> Iterator[Any]:
    try:
        reader = _opened(path)
        if path.suffix == ".parquet":
            yield from reader.iter_batches(
                _rows_at_a_time(path, reader.metadata, column, max_bytes), columns=None if column is None else [column]
            )
        elif hasattr(reader, "get_batch"):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader
    except (OSError, ValueError, MemoryError, KeyError, NotImplementedError) as error:  # pyarrow's are subclasses
        raise _damaged(path, error) from None


def column_of(paths: Iterable[Path], name: str, max_bytes: int | None = None) -> Iterator[tuple[Path, int, Any]]:
    """Yield a column in chunks: (file, index of the first row, pyarrow array of at most `ROWS` rows)."""
    for path in paths:
        row = 0
        columns = _schema(path).names
        for batch in record_batches(path, name, max_bytes):
            if name not in columns:
                fix = f"name another column, or move the file away; its columns are {', '.join(columns)}"
                raise UserError(f"{path} has no column {name}", fix)
            column = batch.column(name)
            yield from ((path, row + begin, column.slice(begin, ROWS)) for begin in range(0, len(column), ROWS))
            row += len(column)


def _saved(folder: Path) -> list[Path]:
    """Return the files that `save_to_disk()` wrote."""
    state = folder / "state.json"
    if not state.is_file():
        raise UserError(f"{folder} has no state.json, which save_to_disk() writes", "save the dataset again")
    entries = _json(state).get("_data_files")
    names: list[Any] = [_at(entry, "filename") for entry in entries] if isinstance(entries, list) else [None]
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or "\0" in name:
            raise UserError(
                f"{shown(state)}: {shown(name)} is no name of a file in its folder", "save the dataset again"
            )
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing, but {state} lists it", "save the dataset again")
    return paths


def _plain(root: Path) -> dict[str, list[Path]]:
    """Return the files by the splits in folder or file names; without any, all of them are training data."""
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith((".", "cache-")) for part in parts)  # cache-: left by map() and shuffle()
        if path.suffix in SUFFIXES and not hidden and path.is_file():
            words = [*parts[:-1], *re.split(r"[-_.]", path.stem.lower())]
            split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")
            files.setdefault(split, []).append(path)
    unnamed = files.pop("", [])
    if unnamed and files:
        names = ", ".join(path.name for path in unnamed[:3])
        fix = f"use names such as train-0.parquet, or folders named {', '.join(SPLITS)}"
        raise UserError(f"data.root={root}: {names}: no split in the name, unlike the other files", fix)
    return files or ({"train": unnamed} if unnamed else {})


def _schema(path: Path) -> Any:
    try:
        reader = _opened(path)
        return reader.schema_arrow if path.suffix == ".parquet" else reader.schema
    except (OSError, ValueError, MemoryError, NotImplementedError) as error:
        raise _damaged(path, error) from None


def _rows_at_a_time(path: Path, metadata: Any, column: str | None, max_bytes: int | None) -> int:
    """Return how many rows of Parquet fit in memory even if each holds the largest value of its column.

    A dictionary of one long text lets a small file unpack to that text in each row.

    Raises:
        UserError: A column of a row group is larger than the limit.
    """
    limit, largest = limit_bytes(max_bytes), 1
    for group in range(metadata.num_row_groups):
        chunks = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
        for chunk in chunks:
            if column is None or chunk.path_in_schema.split(".")[0] == column:
                size = max(chunk.total_uncompressed_size, 0)
                require_within(path, size, limit)
                largest = max(largest, size)
    return max(1, min(ROWS, limit // largest))


def _opened(path: Path) -> Any:
    arrow = pyarrow()
    if path.suffix == ".parquet":
        return arrow.parquet.ParquetFile(path)
    mapped = arrow.memory_map(str(path))
    begins = mapped.read(len(FILE_FORMAT))
    mapped.seek(0)
    return arrow.ipc.open_file(mapped) if begins == FILE_FORMAT else arrow.ipc.open_stream(mapped)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"{shown(path)} cannot be read: {shown(reason)}", "write it again, or remove it")


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, "save the dataset again")


def _at(content: Any, key: str) -> Any:
    """Return the value of a key of a JSON object; None if it is no object, or has no such key."""
    return content.get(key) if isinstance(content, dict) else None
