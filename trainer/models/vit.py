"""Vision transformer: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.models.layers import GELU, Attention, Block, init_transformer


class ViT(nn.Module):
    """Vision transformer: `(batch, channels, height, width)` images to `(batch, num_classes)` logits.

    The logits come from the class token.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        patch: Height and width of a patch in pixels.
        dim: Size of a feature vector.
        layers: Number of blocks.
        heads: Number of attention heads.
        ffn_dim: Size of the feed-forward's hidden layer; None: `4 dim`.
        dropout: Dropout probability.

    Raises:
        UserError: The sizes do not divide.
    """

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        patch: int = 16,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        if height % patch or width % patch:
            raise UserError(
                f"model.patch={patch} does not divide images of {height}x{width}", "use a patch that divides both sides"
            )
        if dim % heads:
            raise UserError(f"model.dim={dim} is not a multiple of model.heads={heads}", "change one of them")
        self.layers = layers
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + height // patch * (width // patch), dim))
        self.dropout = nn.Dropout(dropout)
        self.body = nn.ModuleList(
            Block(
                nn.LayerNorm(dim, eps=1e-6),
                Attention(dim, heads, heads, bias=True, dropout=dropout, causal=False),
                nn.LayerNorm(dim, eps=1e-6),
                GELU(dim, ffn_dim or 4 * dim, bias=True, approximate="none"),
                dropout,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one."""
        return list(self.body)

    def init_weights(self) -> None:
        """Initialise with a normal of standard deviation 0.02; completes a model that was built on the meta device."""
        init_transformer(self, self.layers)
        self.patches.reset_parameters()
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` images to `(batch, num_classes)` logits."""
        tokens = self.patches(inputs).flatten(2).transpose(1, 2)
        features = torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1)
        features = self.dropout(features + self.positions)
        for block in self.body:
            features = block(features)
        logits: Tensor = self.head(self.norm(features[:, 0]))
        return logits
