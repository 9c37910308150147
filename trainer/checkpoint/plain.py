"""Checkpoints that hold only what `torch.load(weights_only=True)` can read.

Lightning puts any object into a checkpoint. Hyperparameters with an OmegaConf node, a Path, a partial or a NumPy scalar
are saved without a warning, and the resume fails. Here they are converted to plain values. If that is impossible, the
save fails and names the entry.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy
import torch
from omegaconf import Container, OmegaConf

from trainer.core.errors import UserError

log = logging.getLogger(__name__)

HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
"""Informative only: a run is rebuilt from config.yaml. Values that are not plain are left out, not refused."""
_HYPER_PARAMETERS_TYPE = ("hparams_type",)
"""Lightning's record of the OmegaConf class of the hyperparameters: a class, and wrong once they are plain."""
_SCALARS: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
_warned: set[tuple[str, str]] = set()
"""Hyperparameters that a warning has named as left out: one warning, not one per save."""
_UNCHANGED = (type(None), *_SCALARS, torch.Size, torch.dtype, torch.device)


class _NotPlain(Exception):
    def __init__(self, where: str, value: Any) -> None:
        kind = type(value)
        super().__init__(f"{where} is a {kind.__module__}.{kind.__qualname__}")


def plain_checkpoint(
    checkpoint: Mapping[str, Any], tensor: Callable[[str, torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Return the checkpoint in plain types.

    Args:
        checkpoint: As Lightning builds it.
        tensor: Called with the key path and the value of each tensor; its result takes the tensor's place.

    Raises:
        UserError: An entry cannot be converted; the message names the first.
    """
    plain: dict[str, Any] = {}
    for key, value in checkpoint.items():
        if key in _HYPER_PARAMETERS_TYPE:
            continue
        try:
            if key in HYPER_PARAMETERS:
                plain[key] = _plain_parameters(key, value, tensor)
            else:
                plain[key] = _plain(key, value, tensor)
        except _NotPlain as error:
            raise UserError(
                f"A run could not be resumed from this checkpoint: {error}.",
                "Return only tensors, numbers, strings, lists and dicts from state_dict() and on_save_checkpoint().",
            ) from None
    return plain


def _plain_parameters(key: str, parameters: Any, tensor: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    if isinstance(parameters, Container):
        parameters = OmegaConf.to_container(parameters, resolve=True)
    kept = {}
    for name, value in dict(parameters).items():
        try:
            kept[str(name)] = _plain(f"{key}.{name}", value, tensor)
        except _NotPlain as error:
            if (key, name) not in _warned:
                _warned.add((key, name))
                log.warning(
                    "Not saved in the checkpoint: %s. save_hyperparameters(ignore=[%r]) hides this.", error, name
                )
    return kept


def _plain(where: str, value: Any, tensor: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return tensor(where, value)
    if type(value) in _UNCHANGED:
        return value
    if isinstance(value, Mapping) and not isinstance(value, Container):
        items = {_plain_key(where, key): _plain(f"{where}.{key}", item, tensor) for key, item in value.items()}
        return _with_metadata(value, items) if isinstance(value, OrderedDict) else items
    if isinstance(value, tuple):
        return tuple(_plain(f"{where}.{index}", item, tensor) for index, item in enumerate(value))
    if isinstance(value, list):
        return [_plain(f"{where}.{index}", item, tensor) for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return {_plain(f"{where}.{index}", item, tensor) for index, item in enumerate(value)}
    if isinstance(value, Container):
        return _plain(where, OmegaConf.to_container(value, resolve=True), tensor)
    if isinstance(value, Enum):
        return _plain(where, value.value, tensor)
    if isinstance(value, numpy.generic):
        return _plain(where, value.item(), tensor)
    if isinstance(value, PurePath):
        return str(value)
    for scalar in _SCALARS:
        if isinstance(value, scalar):
            return scalar(value)
    raise _NotPlain(where, value)


def _plain_key(where: str, key: Any) -> Any:
    if isinstance(key, (Enum, numpy.generic, PurePath)) or type(key) not in _UNCHANGED:
        return _plain(f"{where}.{key} (a key)", key, _no_tensor)
    return key


def _no_tensor(where: str, value: torch.Tensor) -> torch.Tensor:
    raise _NotPlain(where, value)


def _with_metadata(original: OrderedDict[Any, Any], items: dict[Any, Any]) -> OrderedDict[Any, Any]:
    """Keep the versions of the modules, which a state dict has in `_metadata`; load_state_dict migrates by them."""
    copied: OrderedDict[Any, Any] = OrderedDict(items)
    metadata = getattr(original, "_metadata", None)
    if metadata is not None:
        copied._metadata = _plain("_metadata", dict(metadata), _no_tensor)  # type: ignore[attr-defined]
    return copied
