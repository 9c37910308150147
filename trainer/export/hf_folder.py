"""The network of a `model=hf` run as the folder that `from_pretrained` of its class reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.stored import MODEL, Weights
from trainer.core.errors import UserError
from trainer.models.hf import HuggingFace

TARGET = "trainer.models.hf.HuggingFace"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "preprocessor_config.json",
)
"""What a folder of `transformers` has beside the network; copied as it is."""


def without_values(arguments: dict[str, Any]) -> HuggingFace:
    """The network on the meta device."""
    with torch.device("meta"):
        return HuggingFace(**arguments)


def transposed_layers(network: HuggingFace) -> list[str]:
    """Layers whose weight is (inputs, outputs), by their names in the network."""
    return [name for name, layer in network.named_modules() if type(layer).__name__ == "Conv1D"]


def prefix_of(network: HuggingFace, weights: Weights) -> str:
    """What stands before the network's names in the model's state dict. Raises UserError where it is not there."""
    first = next(iter(network.state_dict()))
    for name in weights.shapes:
        if name.startswith(MODEL) and name.endswith(first):
            return name.removeprefix(MODEL).removesuffix(first)
    raise UserError(f"The checkpoint has no {first}: it is of another model.", "Use --format=safetensors.")


def write_folder(network: HuggingFace, weights: Weights, beside: Path | None, target: Path) -> list[Path]:
    """Fill the network, which is then whole in memory, and save it. Returns the files.

    `beside`: the folder that the network came from, whose tokenizer is copied. As `save_pretrained` writes it: for
    some classes names and shapes on disk are not those in memory.
    """
    prefix = MODEL + prefix_of(network, weights)
    state = {}
    for name, empty in network.state_dict().items():
        shape, dtype = weights.shapes.get(prefix + name, (empty.shape, empty.dtype))
        state[name] = torch.empty(shape, dtype=dtype)
    weights.read({prefix + name: tensor for name, tensor in state.items()})
    network.load_state_dict(state, assign=True)
    network.tie()
    from transformers.utils import logging

    logging.disable_progress_bar()
    network.network.save_pretrained(target)
    for name in TOKENIZER_FILES:
        if beside is not None and (beside / name).is_file():
            shutil.copyfile(beside / name, target / name)
    return sorted(path for path in target.iterdir() if path.is_file())
