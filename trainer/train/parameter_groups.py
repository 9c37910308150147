"""Parameter groups of the configured optimizer: which parameters have weight decay, and which ones Muon updates."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import nn

from trainer.strategies.blocks import blocks_of

Decay = Literal["all", "no_norm_bias", "matrices"]
"""Parameters with weight decay: all; all but norms and biases; those of two dimensions or more."""
_NORM = re.compile(r"norm(\d?d)?$", re.IGNORECASE)
"""Matches class names of normalization layers: LayerNorm, RMSNorm, BatchNorm2d, those of other packages."""


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups: one with the optimizer's weight decay, and one without.

    The group without weight decay has the biases and all parameters of normalization layers. Only trainable parameters
    are included.
    """
    return parameter_groups(module, "no_norm_bias")


def parameter_groups(module: nn.Module, decay: Decay, muon: bool = False) -> list[dict[str, Any]]:
    """Return the groups of the trainable parameters; those without weight decay have `weight_decay` 0.

    Args:
        module: The module with all of its parameters, sharded or not.
        decay: Parameters with weight decay.
        muon: Whether the matrices of hidden layers are in groups of their own, with `muon` true.
    """
    hidden = hidden_matrices(module) if muon else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    keys = [(is_hidden, decays) for is_hidden in (True, False) for decays in (True, False)]
    for key in keys:
        groups[key] = []
    seen: set[int] = set()
    for layer in module.modules():
        is_norm = _NORM.search(type(layer).__name__) is not None or isinstance(layer, nn.modules.batchnorm._NormBase)
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_bias = name == "bias" or name.endswith("_bias")
            decays = {
                "all": True,
                "no_norm_bias": not (is_norm or is_bias),
                "matrices": len(shape_of(parameter)) >= 2,
            }[decay]
            groups[id(parameter) in hidden, decays].append(parameter)
    return [
        {"params": groups[key], **({"muon": key[0]} if muon else {}), **({} if key[1] else {"weight_decay": 0.0})}
        for key in keys
        if groups[key]
    ]


def hidden_matrices(module: nn.Module) -> set[int]:
    """Return the ids of the weights of linear layers inside the repeated blocks.

    Without such blocks: those of all linear layers but the last, which is the head. A weight that an embedding shares
    is never one of them.
    """
    embeddings = {id(one) for part in module.modules() if isinstance(part, nn.Embedding) for one in part.parameters()}
    blocks = [block for block in blocks_of(module) if not isinstance(block, nn.Linear) and _has_linear(block)]
    linear = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    if not blocks:
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)][:-1]
    return {id(part.weight) for part in linear if part.weight.requires_grad} - embeddings


def _has_linear(block: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in block.modules())


def shape_of(parameter: Any) -> torch.Size:
    """Return the shape of the whole parameter; under ZeRO-3 the parameter itself is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
