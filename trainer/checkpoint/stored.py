"""A strategy-independent view of a checkpoint: flat names to tensors, and the rest of the state.

Names are `model/<parameter or buffer>` and `optimizer/<number of the optimizer>/<parameter>/<key>`. Values in the
optimizer's state that are not tensors, and the options of the groups, are in `Optimizers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.checkpoint import commit, sharded, wellformed
from trainer.checkpoint.io import load_state, wait_visible
from trainer.checkpoint.named import by_name, plain_names
from trainer.checkpoint.wellformed import BadCheckpoint
from trainer.core.errors import UserError

MODEL = "model/"
OPTIMIZER = "optimizer/"
PARAMETER_NAMES = "parameter_names"
"""Key in a file checkpoint: the parameter names of each group of each optimizer, as in `optimizer_states`."""
OPTIMIZERS = "optimizers"
"""Key in the `state.pt` of a sharded checkpoint: the fields of `Optimizers`."""


class Weights(Protocol):
    """Named tensors on disk."""

    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    """Name to shape and dtype."""

    def read(self, into: dict[str, torch.Tensor]) -> None:
        """Fill the tensors in place."""
        ...


@dataclass
class Optimizers:
    """The non-tensor part of the optimizers' states."""

    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    """Parameter groups of each optimizer: options, and parameter names under `params`."""
    values: dict[str, Any] = field(default_factory=dict)
    """Flat name to value."""


def flatten(named_states: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], Optimizers]:
    """Split optimizer states by name (`named.by_name`) into tensors under flat names and the rest."""
    tensors: dict[str, torch.Tensor] = {}
    rest = Optimizers()
    for number, state in enumerate(named_states):
        rest.groups.append(state["param_groups"])
        for name, entries in state["state"].items():
            for key, value in entries.items():
                flat = f"{OPTIMIZER}{number}/{name}/{key}"
                if isinstance(value, torch.Tensor):
                    tensors[flat] = value
                else:
                    rest.values[flat] = value
    return tensors, rest


def unflatten(tensors: dict[str, torch.Tensor], rest: Optimizers) -> list[dict[str, Any]]:
    """Return the inverse of `flatten`; names without the optimizer prefix are ignored."""
    states: list[dict[str, Any]] = [{"state": {}, "param_groups": groups} for groups in rest.groups]
    for flat, value in {**tensors, **rest.values}.items():
        if flat.startswith(OPTIMIZER):
            number, named = flat.removeprefix(OPTIMIZER).split("/", 1)
            name, key = named.rsplit("/", 1)
            states[int(number)]["state"].setdefault(name, {})[key] = value
    return states


class StoredCheckpoint:
    """A checkpoint opened for reading. `state` is everything except the model's and the optimizers' tensors."""

    def __init__(self, path: Path, mapped: bool = False) -> None:
        """Open the checkpoint at `path`.

        Args:
            path: A checkpoint folder, or a file.
            mapped: Memory-map the tensors of a single-file checkpoint: they stay on disk until they are read.

        Raises:
            UserError: There is no complete checkpoint at `path`.
            BadCheckpoint: It is malformed.
        """
        self.path = path
        self.state = _open(path, mapped)
        self._tensors: dict[str, torch.Tensor] | None = None
        """The tensors of a single-file checkpoint; None for a sharded one."""
        try:
            if OPTIMIZERS in self.state:
                self.optimizers = Optimizers(**self.state.pop(OPTIMIZERS))
                self.shapes = sharded.shapes(path)
            else:
                self._tensors, self.optimizers = _pop_tensors(self.state)
                self.shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = wellformed.shown(f"{type(error).__name__}: {error}")
            raise BadCheckpoint(f"{path} has no state of a training: {reason}", "use another checkpoint") from None

    def read(self, into: dict[str, torch.Tensor]) -> None:
        """Fill tensors and DTensors in place, each rank its own shards.

        Raises:
            UserError: A name is missing or a shape differs, as in a checkpoint of another model.
        """
        self._check(into)
        if self._tensors is None:
            _read_shards(self.path, into)
            return
        with torch.no_grad():
            for name, tensor in into.items():
                whole = self._tensors[name]
                if isinstance(tensor, DTensor):
                    # src_data_rank=None: every rank has the whole tensor and takes its own shard; nothing is sent
                    part = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
                    tensor.to_local().copy_(part.to_local())
                else:
                    tensor.copy_(whole)

    def whole(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return all tensors whose names begin with `prefix`, unsharded, in host memory."""
        if self._tensors is not None:
            return {name: tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}
        tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in self.shapes.items()
            if name.startswith(prefix)
        }
        sharded.read_into(self.path, tensors)
        return tensors

    def as_lightning(self, optimizers: bool = True) -> dict[str, Any]:
        """Return the dict that Lightning would save in one process, with optimizer states by parameter name."""
        tensors = self.whole() if optimizers else self.whole(MODEL)
        weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
        checkpoint = {**self.state, "state_dict": weights}
        if optimizers:
            checkpoint["optimizer_states"] = unflatten(tensors, self.optimizers)
        return checkpoint

    def _check(self, into: dict[str, torch.Tensor]) -> None:
        missing = [name for name in into if name not in self.shapes]
        different = [
            f"{name} has shape {tuple(self.shapes[name][0])} in the checkpoint and {tuple(tensor.shape)} in the model"
            for name, tensor in into.items()
            if name in self.shapes and self.shapes[name][0] != tensor.shape
        ]
        problems = [f"{name} is missing" for name in missing] + different
        if problems:
            shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            raise UserError(
                f"{self.path} does not match the model or optimizer: {shown}.",
                "Use the configuration of the run that wrote the checkpoint: `trainer show RUN`.",
            )


def _open(path: Path, mapped: bool) -> dict[str, Any]:
    if path.is_dir():
        wait_visible(path)
        commit.read_commit(path)
    return load_state(path, mapped=mapped)


def _pop_tensors(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Optimizers]:
    """Remove the tensors from the state of a file checkpoint, and return them under flat names."""
    weights = {MODEL + name: value for name, value in plain_names(state.pop("state_dict")).items()}
    names = state.pop(PARAMETER_NAMES, [])
    states = state.pop("optimizer_states", [])
    tensors, rest = flatten([by_name(one, groups) for one, groups in zip(states, names, strict=False)])
    return {**weights, **tensors}, rest


def _read_shards(path: Path, into: dict[str, torch.Tensor]) -> None:
    """Fill `into` from the shards, except DTensors with no rows on this rank, which DCP cannot fill."""
    sharded.read_into(path, {name: tensor for name, tensor in into.items() if _has_rows(tensor)})


def _has_rows(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, DTensor) or tensor.to_local().numel() > 0
