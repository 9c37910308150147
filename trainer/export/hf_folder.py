"""Export of a `model=hf` run as a folder that `from_pretrained` of its class reads."""

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
"""Files of a `transformers` folder that accompany the network; copied unchanged."""


def without_values(arguments: dict[str, Any]) -> HuggingFace:
    """Return the network on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return HuggingFace(**arguments)


def transposed_layers(network: HuggingFace) -> list[str]:
    """Return the names of the layers whose weight is `(inputs, outputs)`, as in GPT-2's Conv1D."""
    return [name for name, layer in network.named_modules() if type(layer).__name__ == "Conv1D"]


def prefix_of(network: HuggingFace, weights: Weights) -> str:
    """Return the prefix of the network's parameters in the state dict of the LightningModule.

    Raises:
        UserError: If the checkpoint does not hold this network.
    """
    first = next(iter(network.state_dict()))
    for name in weights.shapes:
        if name.startswith(MODEL) and name.endswith(first):
            return name.removeprefix(MODEL).removesuffix(first)
    raise UserError(f"The checkpoint has no {first}: it belongs to another model.", "Use --format=safetensors.")


def write_folder(network: HuggingFace, weights: Weights, origin: Path | None, target: Path) -> list[Path]:
    """Load the weights into the network, completely in memory, and save it with `save_pretrained`.

    `save_pretrained` is needed because some classes use other names and shapes on disk than in memory.

    Args:
        network: The network on the meta device.
        weights: The weights of the checkpoint.
        origin: The folder that the network was loaded from, whose tokenizer files are copied.
        target: The folder to write.

    Returns:
        The files.
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
        if origin is not None and (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)
    return sorted(path for path in target.iterdir() if path.is_file())
