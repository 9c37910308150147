"""Checkpoints with low-rank additions (LoRA), seen as if the additions were part of the weights: W + s B A.

Names are those that peft gives: `LAYER.base_layer.weight`, `LAYER.lora_A.default.weight` and the same with B.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from trainer.checkpoint.stored import MODEL, Weights
from trainer.core.errors import UserError

BASE, ADDED = ".base_layer.", ".lora_"
"""In the names that peft gives: the layer as it was, and what is added to it."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""A (rank, inputs) and B (outputs, rank)."""


def layers(stored: Weights) -> list[str]:
    """Names of the layers that have additions, in the model's state dict."""
    return sorted(
        name.removeprefix(MODEL).removesuffix(DOWN)
        for name in stored.shapes
        if name.startswith(MODEL) and name.endswith(DOWN)
    )


class Merged:
    """`shapes` and `read` of a checkpoint, of the model alone, under the names that it has without additions."""

    def __init__(self, stored: Weights, alpha: float, transposed: Collection[str] = ()) -> None:
        """`alpha`: `finetune.lora_alpha` of the run; the additions are scaled by alpha / rank.

        `transposed`: layers whose weight is (inputs, outputs), such as GPT-2's in `transformers`; needed only for
        square ones, others show it. Raises UserError for additions of another kind.
        """
        self.stored, self.alpha, self.transposed = stored, alpha, set(transposed)
        self.layers = layers(stored)
        weights = {f"{MODEL}{layer}.weight": layer for layer in self.layers}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._stored_as: dict[str, str] = {}
        for name, shape in stored.shapes.items():
            if not name.startswith(MODEL) or name.endswith((DOWN, UP)):
                continue
            if ADDED in name:
                fix = "use --keep-lora, which writes the layers and the additions apart"
                raise UserError(f"{name.removeprefix(MODEL)} cannot be merged into a weight", fix)
            plain = name.replace(BASE, ".")
            self.shapes[plain], self._stored_as[plain] = shape, name
        self._merged = {name: layer for name, layer in weights.items() if name in self.shapes}

    def read(self, into: dict[str, torch.Tensor]) -> None:
        """Fill the tensors in place."""
        self.stored.read({self._stored_as[name]: tensor for name, tensor in into.items()})
        for name, tensor in into.items():
            if name in self._merged:
                self._add(tensor, self._merged[name])

    def _add(self, weight: torch.Tensor, layer: str) -> None:
        parts = {}
        for name in (f"{MODEL}{layer}{DOWN}", f"{MODEL}{layer}{UP}"):
            shape, dtype = self.stored.shapes[name]
            parts[name] = torch.empty(shape, dtype=dtype)
        self.stored.read(parts)
        down, up = (part.float() for part in parts.values())
        added = (up @ down) * (self.alpha / len(down))
        turned = layer in self.transposed if added.shape[0] == added.shape[1] else added.shape != weight.shape
        weight.copy_(weight.float() + (added.t() if turned else added))
