"""One rank of `trainer predict`: `worker/start.py predict RUN_DIR FOLDER SPLIT DATA FOLDER`.

DATA is the section `data` of the configuration as JSON, FOLDER a new, empty one. Each rank reads one contiguous share
of the samples and writes its rows as they come; the first rank puts the shares behind each other.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore, step_of
from trainer.errors import TrainerError, UserError
from trainer.runs.directory import RunDirectory
from trainer.worker import build, hydra_state, rng
from trainer.worker.data import Data
from trainer.worker.process import Rank, die_with_parent
from trainer.worker.torch_setup import init_process_group, silence_known_warnings

RECORD = "predictions.json"
Layout = dict[str, tuple[str, tuple[int, ...], int]]
"""Name of an output to its NumPy type (`json` for what is no tensor), the shape of a row, and the number of rows."""


class RowsWriter(Callback):
    """Writes what `predict_step` returns as rows: one file an output, in the order of the batches."""

    def __init__(self, folder: Path, writes: bool) -> None:
        """`writes`: false on a rank that reads the same samples as another (tensor parallel)."""
        self.folder, self.writes = folder, writes
        self.layout: Layout = {}
        self._files: dict[str, BinaryIO] = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.writes:
            for name, rows in _named(outputs).items():
                self._write(name, rows)

    def _write(self, name: str, rows: Any) -> None:
        if isinstance(rows, Tensor):
            array = (rows.float() if rows.dtype == torch.bfloat16 else rows).detach().cpu().contiguous().numpy()
            kind, shape, data = array.dtype.str, array.shape[1:], array.tobytes()
        else:
            kind, shape, data = "json", (), "".join(json.dumps(row) + "\n" for row in rows).encode()
        before = self.layout.setdefault(name, (kind, shape, 0))
        if before[:2] != (kind, shape):
            raise UserError(
                f"predict_step returned rows of {kind} {shape} after rows of {before[0]} {before[1]} as {name}.",
                "Make them alike, or return a list of plain values.",
            )
        self.layout[name] = (kind, shape, before[2] + len(rows))
        if name not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[name] = open(self.folder / name, "wb")  # noqa: SIM115  closed in `close`
        self._files[name].write(data)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _named(outputs: Any) -> dict[str, Any]:
    """What `predict_step` returned by name: `predictions` when it has no names of its own."""
    found = dict(outputs) if isinstance(outputs, Mapping) else {"predictions": outputs}
    for name, rows in found.items():
        if not isinstance(rows, list) and not (isinstance(rows, Tensor) and rows.dim() > 0):
            raise UserError(
                f"predict_step returned a {type(rows).__name__} as {name}.",
                "Return a tensor or a list with one row a sample, or a dict of them.",
            )
    return found


def main() -> int:
    run, split, folder = RunDirectory(Path(sys.argv[1])), sys.argv[3], Path(sys.argv[5])
    checkpoint = run.checkpoints_dir / sys.argv[2]
    die_with_parent()
    silence_known_warnings()
    rank = Rank.from_environment()
    try:
        record = predict(run, checkpoint, split, json.loads(sys.argv[4]), folder)
    except TrainerError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return error.code
    if rank.is_first:
        (folder / RECORD).write_text(json.dumps(record, indent=1))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def predict(run: RunDirectory, checkpoint: Path, split: str, data_node: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the predictions of `split` into `folder`; returns what describes them. Collective."""
    config, rank = hydra_state.load(run), Rank.from_environment()
    config.data = data_node
    group = init_process_group(config, rank)
    store = CheckpointStore(run.checkpoints_dir)
    trainer = build.build_trainer(config, rank, RunCheckpointIO(CheckpointWriter(store)), str(run.path))
    rng.seed_all(config.seed)
    data = build.build_data(config, rank, trainer, group)
    module = build.build_module(config, data, lambda: None, defer=build.defers(config, rank))
    data.set_up(module)
    if not is_overridden("predict_step", module, LightningModule) and not is_overridden(
        "forward", module, LightningModule
    ):
        raise UserError(f"{type(module).__name__} has no predict_step.", "Give it one, or a forward.")
    num_samples = _use_split(data, split)
    if config.trainer.limit_predict_batches is not None:
        num_samples = None  # not all are predicted
    place = build.place_in_data(config, rank)
    parts = folder / ".parts"
    writer = RowsWriter(parts / str(place.rank), rank.rank % (rank.world_size // place.world_size) == 0)
    build.complete(trainer, [writer], [])
    try:
        trainer.predict(
            module, datamodule=data.module, ckpt_path=str(checkpoint), weights_only=True, return_predictions=False
        )
    finally:
        writer.close()
    layouts: list[Any] = [writer.layout if writer.writes else None]
    if group is not None:
        layouts = [None] * rank.world_size
        torch.distributed.all_gather_object(layouts, writer.layout if writer.writes else None, group=group)
    outputs = joined(parts, [one for one in layouts if one is not None], folder, num_samples, rank.is_first)
    return {
        "run": run.path.name,
        "step": step_of(checkpoint),
        "split": split,
        "outputs": outputs,
        "world_size": rank.world_size,
        "time": time.time(),
    }


def _use_split(data: Data, split: str) -> int | None:
    """Make the loader of `split` the one that is predicted; returns the number of its samples, where it is known."""
    name = f"{split}_dataloader"
    data.owner.setup({"val": "validate"}.get(split, split))
    loader = getattr(data.owner, name)()
    if loader is None or isinstance(loader, (list, tuple)):
        found = "no loader" if not loader else f"{len(loader)} loaders"
        raise UserError(f"--split={split}: the data module's {name} gives {found}.", "One is needed.")
    data.owner.predict_dataloader = lambda: _Batches(loader)  # type: ignore[method-assign]
    return getattr(loader.batch_sampler, "num_samples", None)


class _Batches:
    """A loader that is no DataLoader: Lightning (2.6.6, `_update_dataloader`) makes those anew for a prediction, with
    a batch sampler called as torch's is."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def joined(
    parts: Path, layouts: list[Layout], folder: Path, num_samples: int | None, writes: bool
) -> dict[str, dict[str, Any]]:
    """Put the ranks' rows behind each other into `<output>.npy` or `.jsonl` if `writes`; returns what is in them.

    Raises UserError, on every rank, where rows do not fit together or are not as many as there were samples.
    """
    outputs: dict[str, dict[str, Any]] = {}
    for name in layouts[0]:
        kinds = {layout[name][:2] if name in layout else ("missing", ()) for layout in layouts}
        rows = sum(layout[name][2] for layout in layouts if name in layout)
        if len(kinds) > 1 or (num_samples is not None and rows != num_samples):
            raise UserError(
                f"predict_step gave {rows} rows as {name} for {num_samples} samples, of {len(kinds)} kinds.",
                "Return one row a sample: a tensor whose first dimension is the batch, or a list.",
            )
        ((kind, shape),) = kinds
        file = f"{name}.jsonl" if kind == "json" else f"{name}.npy"
        outputs[name] = {"file": file, "rows": rows, "dtype": kind, "shape": [rows, *shape]}
        if writes:
            with open(folder / file, "wb") as whole:
                if kind != "json":
                    header = {"descr": kind, "fortran_order": False, "shape": (rows, *shape)}
                    numpy.lib.format.write_array_header_1_0(whole, header)
                for number in range(len(layouts)):
                    with open(parts / str(number) / name, "rb") as part:
                        shutil.copyfileobj(part, whole, 4 << 20)
    if writes:
        shutil.rmtree(parts)
    return outputs
