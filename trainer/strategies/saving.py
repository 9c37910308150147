"""Saving and loading of checkpoints by strategies: one class for whole states, one for sharded states.

Both store parameter names without wrappers, so that any strategy can read the checkpoints of any other
(`checkpoint/stored.py`).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.checkpoint import commit
from trainer.checkpoint.io import RunCheckpointIO, info_of, is_users, save_as_lightning
from trainer.checkpoint.named import by_number, fitted, named_groups, plain_name
from trainer.checkpoint.stored import MODEL, OPTIMIZERS, PARAMETER_NAMES, Optimizers, StoredCheckpoint
from trainer.core.errors import UserError
from trainer.runtime import cpu_groups
from trainer.strategies.ending import EndsInPlace

log = logging.getLogger(__name__)


def unwrapped(optimizer: Any) -> Any:
    """Return the torch optimizer inside a LightningOptimizer."""
    return getattr(optimizer, "_optimizer", optimizer)


class WholeCheckpoints(EndsInPlace):
    """Mixin for a strategy in which rank 0 holds the whole state: one file, and the names for other strategies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save with the parameter names next to the optimizer states."""
        if _is_users(self, filepath, storage_options):
            _remove_own_callbacks(self, checkpoint)
        else:
            module = _module_of(self)
            checkpoint[PARAMETER_NAMES] = [
                [group["params"] for group in named_groups(unwrapped(optimizer), module)]
                for optimizer in self.optimizers
            ]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any strategy as the dict that Lightning expects."""
        path = Path(checkpoint_path)
        if path.is_dir() and layout_of(path) != "file":
            return StoredCheckpoint(path).as_lightning()
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, whether or not the module was compiled when they were saved."""
        weights = fitted(checkpoint["state_dict"], _module_of(self).state_dict())
        super().load_model_state_dict({**checkpoint, "state_dict": weights}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer states; those by parameter name are converted to numbers first."""
        states = checkpoint["optimizer_states"]
        for optimizer, names in zip(self.optimizers, checkpoint.get(PARAMETER_NAMES) or [], strict=False):
            _add_groups(unwrapped(optimizer), names, _module_of(self))
        if any(
            isinstance(name, str)
            for state in states
            for group in state.get("param_groups", ())  # Lightning's mock optimizer has none
            for name in group["params"]
        ):
            module = _module_of(self)
            states = [
                by_number(state, unwrapped(optimizer), module)
                for state, optimizer in zip(states, self.optimizers, strict=True)
            ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


class ShardedCheckpoints(EndsInPlace):
    """Mixin for a strategy in which each rank holds shards of the state."""

    _checkpoint_group: dist.ProcessGroup | None = None
    local_state_is_private = False
    """Whether `_local_state` returns copies in host memory, which need no second copy."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: Lightning loads the checkpoint after the parameters are sharded."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False: `load_checkpoint` restores the optimizers, too."""
        return False

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save this rank's shards in place of the states that Lightning collected. Collective."""
        path = self._path_of(filepath)
        if _is_users(self, path, storage_options):
            self._save_as_lightning(checkpoint, path)
            return
        info = replace(info_of(checkpoint, storage_options), layout="sharded")
        checkpoint.pop("state_dict", None)
        checkpoint.pop("optimizer_states", None)
        tensors, optimizers = self._local_state()
        checkpoint[OPTIMIZERS] = asdict(optimizers)
        io = self.checkpoint_io
        assert isinstance(io, RunCheckpointIO), "sharded strategies save through RunCheckpointIO"
        is_private = self.local_state_is_private
        io.writer.save_sharded(tensors, checkpoint, path, info, self._group(), is_private=is_private)

    def _path_of(self, path: Any) -> Path:
        """Return rank 0's path; on a node's own disk, that of the node. Collective."""
        io = self.checkpoint_io
        if isinstance(io, RunCheckpointIO) and io.writer.is_on_disk(Path(path)):
            return Path(path)
        return Path(self.broadcast(str(path)))

    def _save_as_lightning(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Save a file for user code: unsharded weights and everything but the optimizer states, which are sharded."""
        io = self.checkpoint_io
        assert isinstance(io, RunCheckpointIO), "sharded strategies save through RunCheckpointIO"
        io.writer.wait()  # it uses the same group
        weights = gathered(self._local_state()[0], self._group())
        checkpoint.pop("optimizer_states", None)
        if self.is_global_zero:
            _remove_own_callbacks(self, checkpoint)
            log.warning("%s: saved without optimizer state, which is sharded over the ranks", path)
            save_as_lightning({**checkpoint, "state_dict": weights}, path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore model and optimizers in place. Lightning calls this after setup, when both are sharded."""
        stored = StoredCheckpoint(self._path_of(checkpoint_path))
        self._restore(stored)
        # Lightning passes these to hooks and to `load_model_state_dict`, which does nothing here.
        return {**stored.state, "state_dict": {}, "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: `load_checkpoint` has restored the model."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Do nothing: `load_checkpoint` has restored the optimizers."""

    @abstractmethod
    def _local_state(self) -> tuple[dict[str, torch.Tensor], Optimizers]:
        """Return flat names to this rank's tensors, and the rest of the optimizers' states. Collective.

        A tensor is a DTensor, or a whole tensor that no other rank returns.
        """

    @abstractmethod
    def _restore(self, stored: StoredCheckpoint) -> None:
        """Restore the model and, when fitting, the optimizers in place. Collective."""

    def _group(self) -> dist.ProcessGroup | None:
        """Return a gloo group for the background writer alone: two users of one group would mix up their messages."""
        if self._checkpoint_group is None and dist.is_initialized() and dist.get_world_size() > 1:
            timeout = getattr(self, "_timeout", None) or timedelta(minutes=10)
            self._checkpoint_group = cpu_groups.new_group(timeout)
        return self._checkpoint_group


def _add_groups(optimizer: Any, saved: list[list[str]], module: nn.Module) -> None:
    """Add the parameter groups that user code had added during the training, such as in `on_train_epoch_start`.

    Args:
        optimizer: A new optimizer.
        saved: The parameter names of each group in the checkpoint.
        module: The module whose parameters they are.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    free = {plain_name(name): one for name, one in module.named_parameters() if id(one) not in known}
    for names in saved[len(optimizer.param_groups) :]:
        if all(name in free for name in names):
            optimizer.add_param_group({"params": [free[name] for name in names]})


def gathered(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Gather the model's weights, unsharded, on the CPU of rank 0. Collective.

    Args:
        tensors: Flat name to this rank's part, as `ShardedCheckpoints._local_state` returns them.
        group: A gloo group of all ranks; None for one process.

    Returns:
        Parameter name to whole tensor on rank 0, an empty dict on the others.
    """
    first = group is None or dist.get_rank(group) == 0
    whole: dict[str, torch.Tensor] = {}
    mine: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(MODEL):
            continue
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor()
            if first:
                whole[name] = full.detach().cpu()
        else:
            mine[name] = tensor.detach().cpu()
    parts: list[Any] = [mine]
    if group is not None:
        parts = [None] * dist.get_world_size(group)
        dist.gather_object(mine, parts if first else None, dst=0, group=group)
    if not first:
        return {}
    for part in parts:
        whole.update(part)
    return {name.removeprefix(MODEL): tensor for name, tensor in whole.items()}


def _is_users(strategy: Any, path: Any, storage_options: Any) -> bool:
    io = strategy.checkpoint_io
    return isinstance(io, RunCheckpointIO) and is_users(path, storage_options, io.writer.store)


def _remove_own_callbacks(strategy: Any, checkpoint: dict[str, Any]) -> None:
    """Remove the state of this package's callbacks from a file for plain Lightning, which does not have them."""
    callbacks = strategy.lightning_module.trainer.callbacks
    own = {one.state_key for one in callbacks if type(one).__module__.partition(".")[0] == "trainer"}
    if checkpoint.get("callbacks"):
        checkpoint["callbacks"] = {key: state for key, state in checkpoint["callbacks"].items() if key not in own}


def layout_of(path: Path) -> str:
    """Return the layout recorded in COMMIT: file or sharded."""
    try:
        return commit.read_commit(path).layout
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint.", "`trainer show` lists the checkpoints of a run."
        ) from error


def model_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by flat name, without copying them."""
    return {
        MODEL + plain_name(name): value
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def _module_of(strategy: Any) -> nn.Module:
    module: nn.Module | None = strategy.lightning_module
    assert module is not None
    return module
