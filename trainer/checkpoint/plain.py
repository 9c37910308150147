"""Makes a checkpoint hold only what `torch.load(weights_only=True)` reads back, or says at once why it cannot.

Lightning puts whatever it finds into a checkpoint; hyper-parameters with an OmegaConf node, a Path, a partial or a
NumPy scalar save without a word and fail when the job is resumed. Here they are turned into plain values, or the
save is refused with the place named.
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
"""Informative only (a run is rebuilt from config.yaml), so what is not plain there is left out, not refused."""
_HYPER_PARAMETERS_TYPE = ("hparams_type",)
"""Lightning's note of the OmegaConf class of the former: a class, and untrue once they are plain."""
_SCALARS: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
_told: set[tuple[str, str]] = set()
"""Hyper-parameters whose absence has been logged; each save would say it again."""
_AS_THEY_ARE = (type(None), *_SCALARS, torch.Size, torch.dtype, torch.device)


class _NotPlain(Exception):
    def __init__(self, where: str, value: Any) -> None:
        kind = type(value)
        super().__init__(f"{where} is a {kind.__module__}.{kind.__qualname__}")


def plain_checkpoint(
    checkpoint: Mapping[str, Any], tensor: Callable[[str, torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """The same checkpoint in plain types; each tensor is what `tensor(its place, it)` returns.

    Raises UserError naming the first place that holds something else.
    """
    found: dict[str, Any] = {}
    for key, value in checkpoint.items():
        if key in _HYPER_PARAMETERS_TYPE:
            continue
        try:
            if key in HYPER_PARAMETERS:
                found[key] = _plain_parameters(key, value, tensor)
            else:
                found[key] = _plain(key, value, tensor)
        except _NotPlain as error:
            raise UserError(
                f"The checkpoint could not be resumed from: {error}.",
                "Return only tensors, numbers, text, lists and dicts from state_dict() and on_save_checkpoint().",
            ) from None
    return found


def _plain_parameters(key: str, parameters: Any, tensor: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    if isinstance(parameters, Container):
        parameters = OmegaConf.to_container(parameters, resolve=True)
    kept = {}
    for name, value in dict(parameters).items():
        try:
            kept[str(name)] = _plain(f"{key}.{name}", value, tensor)
        except _NotPlain as error:
            if (key, name) not in _told:
                _told.add((key, name))
                log.warning("Left out of the checkpoint: %s. save_hyperparameters(ignore=[%r]) says so.", error, name)
    return kept


def _plain(where: str, value: Any, tensor: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return tensor(where, value)
    if type(value) in _AS_THEY_ARE:
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
    if isinstance(key, (Enum, numpy.generic, PurePath)) or type(key) not in _AS_THEY_ARE:
        return _plain(f"{where}.{key} (a key)", key, _no_tensor)
    return key


def _no_tensor(where: str, value: torch.Tensor) -> torch.Tensor:
    raise _NotPlain(where, value)


def _with_metadata(original: OrderedDict[Any, Any], items: dict[Any, Any]) -> OrderedDict[Any, Any]:
    """A module's state dict keeps its modules' versions in this attribute; load_state_dict migrates by them."""
    copied: OrderedDict[Any, Any] = OrderedDict(items)
    metadata = getattr(original, "_metadata", None)
    if metadata is not None:
        copied._metadata = _plain("_metadata", dict(metadata), _no_tensor)  # type: ignore[attr-defined]
    return copied
