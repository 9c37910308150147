"""Writes the outputs of `predict_step` as named rows: one per sample where possible, else one per batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy
import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.runs.records import PredictedOutput

Layout = dict[str, tuple[str, tuple[int, ...], int]]
"""Output to its NumPy type (`json` if it is not a tensor of one shape), the shape of a row, and the number of rows."""
JSON = "json"
"""Type of an output that is written as lines of JSON."""
DEFAULT = "predictions"
"""Name of an output without a name."""


class PredictionWriter:
    """Writes outputs as rows: one file per output, in the order of the batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout: Layout = {}
        self.by_batch: set[str] = set()
        """Names of outputs with one row per batch."""
        self._files: dict[str, BinaryIO] = {}
        self._counts: dict[str, list[int]] = {}
        """Output to the number of rows of each batch so far."""
        self._is_split: dict[str, bool] = {}
        """Output to whether a list holds several outputs, decided on the first batch: a later list may have as many
        entries as the batch by chance."""

    def add(self, outputs: Any, batch_size: int | None, prefix: str = "") -> None:
        """Write the outputs of a batch of `batch_size` samples (None: not known); `prefix`: name of the loader."""
        for name, value in self._flatten("", outputs, batch_size):
            self._write(f"{prefix}.{name or DEFAULT}" if prefix else name or DEFAULT, value, batch_size)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _flatten(self, name: str, value: Any, batch_size: int | None) -> Iterator[tuple[str, Any]]:
        """Yield outputs with their names: keys and fields joined by dots, positions in a tuple as numbers."""
        if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif isinstance(value, tuple) and hasattr(value, "_asdict"):
            value = value._asdict()
        elif isinstance(value, numpy.ndarray) and value.dtype != object:
            value = torch.from_numpy(value) if value.dtype.kind in "biufc" else value.tolist()
        if value is None:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._flatten(f"{name}.{key}" if name else str(key), item, batch_size)
        elif isinstance(value, (tuple, list)) and self._is_several_outputs(name, value, batch_size):
            for number, item in enumerate(value):
                yield from self._flatten(f"{name or DEFAULT}.{number}", item, batch_size)
        else:
            yield name, value

    def _is_several_outputs(self, name: str, value: tuple[Any, ...] | list[Any], batch_size: int | None) -> bool:
        """Return whether a tuple or list holds several outputs of the batch, rather than one entry per sample."""
        if name not in self._is_split:
            items = [item for item in value if item is not None]
            are_tensors = all(isinstance(item, Tensor) and item.dim() > 0 for item in items) and bool(items)
            are_batches = are_tensors and (batch_size is None or all(len(item) == batch_size for item in items))
            fits = batch_size is None or len(value) == batch_size
            self._is_split[name] = (isinstance(value, tuple) and (are_batches or not fits)) or (
                not fits and are_batches
            )
        return self._is_split[name]

    def _write(self, name: str, value: Any, batch_size: int | None) -> None:
        has_rows = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0)
        if name not in self.by_batch and not (has_rows and batch_size in (None, len(value))):
            self.group_by_batch(name)
        rows = [value] if name in self.by_batch else value if isinstance(value, Tensor) else list(value)
        if isinstance(rows, Tensor):
            array = _to_numpy(rows)
            kind, shape, data = array.dtype.str, tuple(array.shape[1:]), array.tobytes()
        else:
            kind, shape, data = JSON, (), _json_lines(name, rows)
        before = self.layout.setdefault(name, (kind, shape, 0))
        if before[:2] != (kind, shape):  # ragged: rows have different shapes
            self._to_json(name)
            if isinstance(rows, Tensor):
                data = _json_lines(name, list(rows))
        self.layout[name] = (*self.layout[name][:2], before[2] + len(rows))
        self._counts.setdefault(name, []).append(len(rows))
        if name not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[name] = open(self.folder / file_stem(name), "wb")  # noqa: SIM115  closed in `close`
        self._files[name].write(data)

    def group_by_batch(self, name: str) -> None:
        """Write one row per batch from now on, and regroup the rows so far, which matched the samples by chance."""
        if name in self.by_batch:
            return
        self.by_batch.add(name)
        if name not in self.layout:
            return
        self._to_json(name)
        self._files.pop(name).close()
        path = self.folder / file_stem(name)
        lines = iter(path.read_text().splitlines())
        counts = self._counts[name]
        path.write_text("".join(f"[{', '.join(next(lines) for _ in range(count))}]\n" for count in counts))
        self.layout[name] = (JSON, (), len(counts))
        self._counts[name] = [1] * len(counts)
        self._files[name] = open(path, "ab")  # noqa: SIM115  closed in `close`

    def _to_json(self, name: str) -> None:
        if self.layout[name][0] == JSON:
            return
        self._files.pop(name).close()
        path = self.folder / file_stem(name)
        convert_to_json(path, self.layout[name])
        self.layout[name] = (JSON, (), self.layout[name][2])
        self._files[name] = open(path, "ab")  # noqa: SIM115  closed in `close`


def file_stem(name: str) -> str:
    """Return the name of an output as part of a file name."""
    return name.replace("/", ".").replace("\0", "").lstrip(".") or DEFAULT


def convert_to_json(path: Path, layout: tuple[str, tuple[int, ...], int]) -> None:
    """Rewrite a file of raw rows as lines of JSON."""
    kind, shape, rows = layout
    array = numpy.fromfile(path, dtype=kind).reshape(rows, *shape)
    path.write_bytes(_json_lines(path.name, list(torch.from_numpy(array))))


def _to_numpy(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    """Return a dense array; types that NumPy does not have become float32."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    wide = tensor.dtype in (torch.bfloat16,) or (tensor.dtype.itemsize == 1 and tensor.is_floating_point())
    return (tensor.float() if wide else tensor).contiguous().numpy()


def _json_lines(name: str, rows: list[Any]) -> bytes:
    """Return one line of JSON per row. Raises UserError for values that JSON cannot express."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _to_numpy(value).tolist()
        if isinstance(value, (numpy.ndarray, numpy.generic)):
            return value.tolist()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, Path):
            return str(value)
        raise UserError(
            f"predict_step returned a {type(value).__name__} in {name}, which cannot be written",
            "return tensors, arrays, numbers, text, or lists and dicts of them",
        )

    return "".join(json.dumps(row, default=plain) + "\n" for row in rows).encode()


@dataclasses.dataclass(frozen=True)
class Shares:
    """Rows that the ranks have written."""

    folder: Path
    """Folder with one subfolder per rank, named by its number, with the rows of the rank."""
    layouts: list[Layout]
    """Layout of each rank's rows."""
    by_batch: frozenset[str] = frozenset()
    """Names of outputs with one row per batch."""


def merge_shares(
    shares: Shares, folder: Path, num_samples: dict[str, int | None], *, writes: bool
) -> dict[str, PredictedOutput]:
    """Concatenate the rows of all ranks into `<output>.npy` or `<output>.jsonl`.

    An output whose rows have different shapes on different ranks becomes JSON.

    Args:
        shares: Rows that the ranks have written.
        folder: Folder of the merged files.
        num_samples: Prefix of an output's name to the samples of its loader; None: not known.
        writes: Whether this rank writes the files.

    Returns:
        For each output its file, number of rows, type and shape.

    Raises:
        UserError: On every rank, if the numbers of rows and samples differ.
    """
    layouts, by_batch = shares.layouts, shares.by_batch
    outputs: dict[str, PredictedOutput] = {}
    for name in dict.fromkeys(name for layout in layouts for name in layout):
        kinds = {layout[name][:2] for layout in layouts if name in layout}
        rows = sum(layout[name][2] for layout in layouts if name in layout)
        expected = next((count for prefix, count in num_samples.items() if name.startswith(prefix)), None)
        if expected is not None and rows != expected and name not in by_batch:
            raise UserError(
                f"predict_step returned {rows} rows as {name} for {expected} samples",
                "return one row per sample: a tensor whose first dimension is the batch, or a list",
            )
        is_array = len(kinds) == 1 and JSON not in {kind for kind, _ in kinds}
        kind, shape = next(iter(kinds)) if is_array else (JSON, ())
        file = f"{file_stem(name)}.{'npy' if is_array else 'jsonl'}"
        row: Literal["batch"] | None = "batch" if name in by_batch else None
        outputs[name] = PredictedOutput(file=file, rows=rows, dtype=kind, shape=[rows, *shape], row=row)
        if not writes:
            continue
        with open(folder / file, "wb") as merged:
            if is_array:
                header = {"descr": kind, "fortran_order": False, "shape": (rows, *shape)}
                numpy.lib.format.write_array_header_1_0(merged, header)
            for number, layout in enumerate(layouts):
                path = shares.folder / str(number) / file_stem(name)
                if name not in layout or not path.exists():
                    continue
                if not is_array and layout[name][0] != JSON:
                    convert_to_json(path, layout[name])
                with open(path, "rb") as share:
                    shutil.copyfileobj(share, merged, 4 << 20)
    if writes:
        shutil.rmtree(shares.folder, ignore_errors=True)
    return outputs
