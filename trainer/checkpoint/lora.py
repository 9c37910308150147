"""Checkpoints with LoRA adapters, read as if the adapters were merged into the weights: W + (alpha / rank) B A.

peft's names: `LAYER.base_layer.weight`, `LAYER.lora_A.default.weight`, `LAYER.lora_B.default.weight`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from trainer.checkpoint.stored import MODEL, Weights
from trainer.core.errors import UserError

BASE, ADAPTER = ".base_layer.", ".lora_"
"""Parts of the names that peft gives to the base layer and to its adapters."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""Suffixes of A `(rank, inputs)` and B `(outputs, rank)`."""


def layers(stored: Weights) -> list[str]:
    """Return the names of the layers that have adapters, as in the model's state dict."""
    return sorted(
        name.removeprefix(MODEL).removesuffix(DOWN)
        for name in stored.shapes
        if name.startswith(MODEL) and name.endswith(DOWN)
    )


class Merged:
    """The model's weights with the adapters merged, under the names that the model has without adapters."""

    def __init__(self, stored: Weights, alpha: float, transposed: Collection[str] = ()) -> None:
        """Find the merged weights; nothing is read yet.

        Args:
            stored: The checkpoint.
            alpha: `finetune.lora_alpha` of the run; B A is scaled by alpha / rank.
            transposed: Layers whose weight is `(inputs, outputs)`, such as GPT-2's in `transformers`. Needed only for
                square weights; for others the shapes are enough.

        Raises:
            UserError: The checkpoint has adapters that cannot be merged.
        """
        self.stored, self.alpha, self.transposed = stored, alpha, set(transposed)
        self.layers = layers(stored)
        weights = {f"{MODEL}{layer}.weight": layer for layer in self.layers}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._stored_as: dict[str, str] = {}
        for name, shape in stored.shapes.items():
            if not name.startswith(MODEL) or name.endswith((DOWN, UP)):
                continue
            if ADAPTER in name:
                fix = "use --keep-lora, which exports base layers and adapters separately"
                raise UserError(f"{name.removeprefix(MODEL)} cannot be merged into a weight", fix)
            plain = name.replace(BASE, ".")
            self.shapes[plain], self._stored_as[plain] = shape, name
        self._merged = {name: layer for name, layer in weights.items() if name in self.shapes}

    def read(self, into: dict[str, torch.Tensor]) -> None:
        """Fill the tensors in place, adapters merged."""
        self.stored.read({self._stored_as[name]: tensor for name, tensor in into.items()})
        for name, tensor in into.items():
            if name in self._merged:
                self._merge(tensor, self._merged[name])

    def _merge(self, weight: torch.Tensor, layer: str) -> None:
        parts = {}
        for name in (f"{MODEL}{layer}{DOWN}", f"{MODEL}{layer}{UP}"):
            shape, dtype = self.stored.shapes[name]
            parts[name] = torch.empty(shape, dtype=dtype)
        self.stored.read(parts)
        down, up = (part.float() for part in parts.values())
        delta = (up @ down) * (self.alpha / len(down))
        is_transposed = layer in self.transposed if delta.shape[0] == delta.shape[1] else delta.shape != weight.shape
        weight.copy_(weight.float() + (delta.t() if is_transposed else delta))
