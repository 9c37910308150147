"""What `predict_step` returns, as named rows: one for each sample where that can be told, else one for each batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from trainer.core.errors import UserError

Layout = dict[str, tuple[str, tuple[int, ...], int]]
"""Name of an output to its NumPy type (`json` for what is no tensor of one shape), the shape of a row, and the number
of rows."""
JSON = "json"
DEFAULT = "predictions"
"""The name of an output that has none of its own."""


class Rows:
    """Writes outputs as rows: a file for each, in the order of the batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout: Layout = {}
        self.by_batch: set[str] = set()
        """Names of outputs with one row for each batch."""
        self._files: dict[str, BinaryIO] = {}
        self._counts: dict[str, list[int]] = {}
        """Name to the rows of each batch so far."""
        self._is_split: dict[str, bool] = {}
        """Name to whether a list is several outputs, as it was in the first batch: a later one may be as long as the
        batch by chance."""

    def add(self, outputs: Any, batch_size: int | None, prefix: str = "") -> None:
        """Write what a batch of `batch_size` samples (null: not known) gave."""
        for name, value in self._flat("", outputs, batch_size):
            self._write(f"{prefix}.{name or DEFAULT}" if prefix else name or DEFAULT, value, batch_size)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _flat(self, name: str, value: Any, batch_size: int | None) -> Iterator[tuple[str, Any]]:
        """Outputs by name: keys and fields joined by dots, numbers of tuples as names."""
        if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif isinstance(value, tuple) and hasattr(value, "_asdict"):
            value = value._asdict()
        elif isinstance(value, numpy.ndarray) and value.dtype != object:
            value = torch.from_numpy(value) if value.dtype.kind in "biufc" else value.tolist()
        if value is None:
            return
        if isinstance(value, Mapping):
            for key, one in value.items():
                yield from self._flat(f"{name}.{key}" if name else str(key), one, batch_size)
        elif isinstance(value, (tuple, list)) and self._splits(name, value, batch_size):
            for number, one in enumerate(value):
                yield from self._flat(f"{name or DEFAULT}.{number}", one, batch_size)
        else:
            yield name, value

    def _splits(self, name: str, value: tuple[Any, ...] | list[Any], batch_size: int | None) -> bool:
        """Whether a tuple or list is several outputs of the batch, rather than one entry for each sample."""
        if name not in self._is_split:
            parts = [one for one in value if one is not None]
            whole = all(isinstance(one, Tensor) and one.dim() > 0 for one in parts) and bool(parts)
            each = whole and (batch_size is None or all(len(one) == batch_size for one in parts))
            fits = batch_size is None or len(value) == batch_size
            self._is_split[name] = (isinstance(value, tuple) and (each or not fits)) or (not fits and each)
        return self._is_split[name]

    def _write(self, name: str, value: Any, batch_size: int | None) -> None:
        is_row_each = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0)
        if name not in self.by_batch and not (is_row_each and batch_size in (None, len(value))):
            self.group_by_batch(name)
        rows = [value] if name in self.by_batch else value if isinstance(value, Tensor) else list(value)
        if isinstance(rows, Tensor):
            array = _array(rows)
            kind, shape, data = array.dtype.str, tuple(array.shape[1:]), array.tobytes()
        else:
            kind, shape, data = JSON, (), _lines(name, rows)
        before = self.layout.setdefault(name, (kind, shape, 0))
        if before[:2] != (kind, shape):  # ragged: each row has a shape of its own
            self._to_json(name)
            if isinstance(rows, Tensor):
                data = _lines(name, list(rows))
        self.layout[name] = (*self.layout[name][:2], before[2] + len(rows))
        self._counts.setdefault(name, []).append(len(rows))
        if name not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[name] = open(self.folder / file_part(name), "wb")  # noqa: SIM115  closed in `close`
        self._files[name].write(data)

    def group_by_batch(self, name: str) -> None:
        """From now on one row for each batch, and so are those before: some were as many as the samples by chance."""
        if name in self.by_batch:
            return
        self.by_batch.add(name)
        if name not in self.layout:
            return
        self._to_json(name)
        self._files.pop(name).close()
        path = self.folder / file_part(name)
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
        path = self.folder / file_part(name)
        to_json(path, self.layout[name])
        self.layout[name] = (JSON, (), self.layout[name][2])
        self._files[name] = open(path, "ab")  # noqa: SIM115  closed in `close`


def file_part(name: str) -> str:
    """The name of an output as one of a file."""
    return name.replace("/", ".").replace("\0", "").lstrip(".") or DEFAULT


def to_json(path: Path, layout: tuple[str, tuple[int, ...], int]) -> None:
    """Rewrite raw rows as lines of JSON."""
    kind, shape, rows = layout
    array = numpy.fromfile(path, dtype=kind).reshape(rows, *shape)
    path.write_bytes(_lines(path.name, list(torch.from_numpy(array))))


def _array(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    wide = tensor.dtype in (torch.bfloat16,) or (tensor.dtype.itemsize == 1 and tensor.is_floating_point())
    return (tensor.float() if wide else tensor).contiguous().numpy()


def _lines(name: str, rows: list[Any]) -> bytes:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _array(value).tolist()
        if isinstance(value, (numpy.ndarray, numpy.generic)):
            return value.tolist()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, Path):
            return str(value)
        raise UserError(
            f"predict_step returned a {type(value).__name__} in {name}, which cannot be written.",
            "Return tensors, arrays, numbers, text, or lists and dicts of them.",
        )

    return "".join(json.dumps(row, default=plain) + "\n" for row in rows).encode()


def joined(
    parts: Path,
    layouts: list[Layout],
    folder: Path,
    num_samples: dict[str, int | None],
    writes: bool,
    by_batch: frozenset[str] = frozenset(),
) -> dict[str, dict[str, Any]]:
    """Put the ranks' rows behind each other into `<output>.npy` or `.jsonl` if `writes`; returns what is in them.

    `num_samples`: beginning of a name to the samples of its loader, null where they are not known. `by_batch`: names of
    those that have one row for each batch. An output whose rows have different shapes on different ranks becomes JSON.
    Raises UserError, on every rank, where there are not as many rows as there were samples.
    """
    outputs: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for layout in layouts for name in layout):
        kinds = {layout[name][:2] for layout in layouts if name in layout}
        rows = sum(layout[name][2] for layout in layouts if name in layout)
        wanted = next((count for prefix, count in num_samples.items() if name.startswith(prefix)), None)
        if wanted is not None and rows != wanted and name not in by_batch:
            raise UserError(
                f"predict_step gave {rows} rows as {name} for {wanted} samples.",
                "Return one row a sample: a tensor whose first dimension is the batch, or a list.",
            )
        is_one = len(kinds) == 1 and JSON not in {kind for kind, _ in kinds}
        kind, shape = next(iter(kinds)) if is_one else (JSON, ())
        file = f"{file_part(name)}.{'npy' if is_one else 'jsonl'}"
        outputs[name] = {"file": file, "rows": rows, "dtype": kind, "shape": [rows, *shape]}
        if name in by_batch:
            outputs[name]["row"] = "batch"
        if not writes:
            continue
        with open(folder / file, "wb") as whole:
            if is_one:
                header = {"descr": kind, "fortran_order": False, "shape": (rows, *shape)}
                numpy.lib.format.write_array_header_1_0(whole, header)
            for number, layout in enumerate(layouts):
                path = parts / str(number) / file_part(name)
                if name not in layout or not path.exists():
                    continue
                if not is_one and layout[name][0] != JSON:
                    to_json(path, layout[name])
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, whole, 4 << 20)
    if writes:
        shutil.rmtree(parts, ignore_errors=True)
    return outputs
