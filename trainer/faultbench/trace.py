"""A callback that records the inputs and results of each training batch, for `trainer verify-resume`."""

from __future__ import annotations

import json
import random
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from trainer.core.files import append_line
from trainer.runs.directory import RunDirectory
from trainer.runtime.process import Rank
from trainer.tracking.metrics_file import run_folder

MAX_LENGTH = 60
"""Characters after which the text of a value is cut."""
_MODULE_NAMES = set(vars(nn.Module()))
_LIGHTNING_NAMES = set(vars(LightningModule())) | {"_trainer", "_jit_is_scripting"}
_DATA_NAMES = set(vars(LightningDataModule()))


class ResumeTrace(Callback):
    """A callback that writes a line of JSON per batch to `trace/attempt-NN-rank-R.jsonl` in the run directory.

    {"batch": total number, "step", "epoch", "steps_per_epoch", "in": inputs of the batch, "out": its results}. Inputs
    and results are checksums or short texts, in dicts by name.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._inputs: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the file of this rank and attempt."""
        rank = Rank.from_environment()
        self._path = RunDirectory(run_folder(trainer)).trace_path(rank.attempt, rank.rank)
        self._path.parent.mkdir(exist_ok=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect the inputs of the batch."""
        self._inputs = {
            "hash": {"hash of a text": hash("trainer")},
            "progress": {"epoch": trainer.current_epoch, "batch": batch_idx, "step": trainer.global_step},
            "data": {"batch": _checksum(batch)},
            "parameters": {name: _checksum(value) for name, value in pl_module.named_parameters()},
            "buffers": {name: _checksum(value) for name, value in pl_module.named_buffers()},
            "options": _options(trainer),
            "optimizer": {
                str(number): _checksum(one.state_dict().get("state", {})) for number, one in _optimizers(trainer)
            },
            "schedulers": _schedulers(trainer),
            "frozen": {name: str(not value.requires_grad) for name, value in pl_module.named_parameters()},
            "accumulation": {"accumulate_grad_batches": trainer.accumulate_grad_batches},
            "random": _generators(),
            "callbacks": _callbacks(trainer, lambda callback: callback.state_dict()),
            "attributes": {
                **_attributes(pl_module),
                **_data_attributes(trainer),
                **_callbacks(trainer, _own_attributes),
            },
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line of the batch."""
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        line = {
            "batch": trainer.fit_loop.total_batch_idx,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "steps_per_epoch": None if batches == float("inf") else -(-int(batches) // accumulate),
            "in": self._inputs,
            "out": {
                "loss": _shown(outputs.get("loss") if isinstance(outputs, Mapping) else outputs),
                "parameters": _checksum(dict(pl_module.named_parameters())),
            },
        }
        append_line(self._path, json.dumps(line))


def _optimizers(trainer: Trainer) -> list[tuple[int, Any]]:
    return list(enumerate(trainer.optimizers))


def _options(trainer: Trainer) -> dict[str, str | None]:
    """Return the options of the optimizers, such as learning rates, by optimizer, group and name."""
    return {
        f"{number}.{index}.{key}": _shown(value)
        for number, optimizer in _optimizers(trainer)
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }


def _schedulers(trainer: Trainer) -> dict[str, str | None]:
    return {
        f"{number} ({type(config.scheduler).__name__}).{key}": _shown(value)
        for number, config in enumerate(trainer.lr_scheduler_configs)
        for key, value in config.scheduler.state_dict().items()
    }


def _generators() -> dict[str, int]:
    states = {"python": repr(random.getstate()), "numpy": repr(numpy.random.get_state()[1].tobytes())}  # type: ignore[index]
    checksums = {name: zlib.crc32(text.encode()) for name, text in states.items()}
    checksums["torch"] = _checksum(torch.get_rng_state())
    if torch.cuda.is_available():
        checksums["cuda"] = _checksum(torch.cuda.get_rng_state())
    return checksums


def _callbacks(trainer: Trainer, of: Callable[[Callback], Mapping[str, Any]]) -> dict[str, str]:
    """Return the values of the user's and Lightning's callbacks, without those of this package."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return {
        f"{type(callback).__name__}.{name}": shown
        for callback in callbacks
        if not type(callback).__module__.startswith("trainer.")
        for name, value in of(callback).items()
        if (shown := _shown(value)) is not None
    }


def _own_attributes(callback: Callback) -> dict[str, Any]:
    """Return the attributes of a callback, or nothing for Lightning's own, which save what they need."""
    return {} if type(callback).__module__.startswith(("lightning.", "pytorch_lightning.")) else vars(callback)


def _data_attributes(trainer: Trainer) -> dict[str, str]:
    """Return the attributes of the data module that are plain values."""
    values = vars(trainer.datamodule) if trainer.datamodule is not None else {}  # type: ignore[attr-defined]
    return {
        f"{type(trainer.datamodule).__name__}.{name}": shown  # type: ignore[attr-defined]
        for name, value in values.items()
        if name not in _DATA_NAMES and not name.startswith("_hparams") and (shown := _shown(value)) is not None
    }


def _attributes(module: LightningModule) -> dict[str, str]:
    """Return the attributes of a module and its submodules that are plain values."""
    attributes = {}
    for where, part in module.named_modules():
        known = _LIGHTNING_NAMES if isinstance(part, LightningModule) else _MODULE_NAMES
        for name, value in vars(part).items():
            if name not in known and not name.startswith("_hparams") and (shown := _shown(value)) is not None:
                attributes[f"{where}.{name}" if where else name] = shown
    return attributes


def _shown(value: Any) -> str | None:
    """Return a short text, with a checksum if it is cut, or None if the value is not plain."""
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 else f"tensor {tuple(value.shape)} {_checksum(value):08x}"
    if not _is_plain(value):
        return None
    text = repr(sorted(value, key=repr)) if isinstance(value, (set, frozenset)) else repr(value)
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}... {zlib.crc32(text.encode()):08x}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, bytes, numpy.generic, numpy.ndarray, Tensor))


def _checksum(tree: Any) -> int:
    """Return a CRC-32 of the tensors and plain values in nested containers, in order."""
    checksum = 0
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            bits = local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        else:
            bits = repr(leaf).encode() if _is_plain(leaf) else b""
        checksum = zlib.crc32(bits, checksum)
    return checksum
