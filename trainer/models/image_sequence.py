"""From pictures to sequences and from sequences to pictures: one transformer over patches and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.models.layers import GELU, Attention, Block, init_transformer


class ImageToSequence(nn.Module):
    """(n, channels, height, width) and (n, length) tokens so far to (n, length, vocab_size) logits of the next ones.

    The patches of the picture stand before the tokens in one causal transformer (as in Fuyu, Bavishi et al. 2023):
    each token sees the whole picture and the tokens before it.
    """

    for_tasks = ("trainer.tasks.image_to_sequence.ImageToSequence",)

    def __init__(
        self,
        input_shape: Sequence[int],
        vocab_size: int,
        sequence_length: int,
        patch: int = 4,
        dim: int = 64,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        """`sequence_length`: the longest sequence. `patch`: pixels of a side."""
        super().__init__()
        channels, height, width = input_shape
        self.layers, self.patches = layers, _grid(height, width, patch)
        self.patch = nn.Conv2d(channels, dim, patch, stride=patch)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(self.patches + sequence_length, dim)
        self.body = _blocks(dim, layers, heads, dropout, causal=True)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        self.init_weights()

    def blocks(self) -> list[nn.Module]:
        """What a sharding strategy wraps one by one."""
        return list(self.body)

    def init_weights(self) -> None:
        """GPT-2's, and torch's own of the patches."""
        init_transformer(self, self.layers)
        self.patch.reset_parameters()

    def forward(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        seen = self.patch(pictures).flatten(2).transpose(1, 2)
        features = torch.cat((seen, self.embedding(tokens)), 1)
        features = features + self.positions.weight[: features.shape[1]]
        for block in self.body:
            features = block(features)
        return self.head(self.norm(features[:, self.patches :]))


class SequenceToImage(nn.Module):
    """(n, length) tokens to (n, channels, height, width).

    A learnt query for each patch stands behind the tokens in one transformer that sees both ways, and becomes the
    pixels of its patch: all patches at once, so that where several pictures fit the tokens it draws their mean.
    """

    for_tasks = ("trainer.tasks.sequence_to_image.SequenceToImage",)

    def __init__(
        self,
        output_shape: Sequence[int],
        vocab_size: int,
        sequence_length: int,
        patch: int = 4,
        dim: int = 64,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels, self.height, self.width = output_shape
        self.layers, self.size, self.length = layers, patch, sequence_length
        patches = _grid(self.height, self.width, patch)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(sequence_length + patches, dim)
        self.body = _blocks(dim, layers, heads, dropout, causal=False)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, self.channels * patch * patch)
        self.init_weights()

    def blocks(self) -> list[nn.Module]:
        """What a sharding strategy wraps one by one."""
        return list(self.body)

    def init_weights(self) -> None:
        """GPT-2's; completes a model made on the meta device."""
        init_transformer(self, self.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        number, length = tokens.shape
        queries = self.positions.weight[self.length :].expand(number, -1, -1)
        features = torch.cat((self.embedding(tokens) + self.positions.weight[:length], queries), 1)
        for block in self.body:
            features = block(features)
        pixels = self.head(self.norm(features[:, length:]))
        rows, columns = self.height // self.size, self.width // self.size
        cells = pixels.view(number, rows, columns, self.channels, self.size, self.size)
        return cells.permute(0, 3, 1, 4, 2, 5).reshape(number, self.channels, self.height, self.width)


def _grid(height: int, width: int, patch: int) -> int:
    if height % patch or width % patch:
        raise UserError(
            f"model.patch={patch} does not divide pictures of {height}x{width}", "use a patch that divides both sides"
        )
    return (height // patch) * (width // patch)


def _blocks(dim: int, layers: int, heads: int, dropout: float, causal: bool) -> nn.ModuleList:
    if dim % heads:
        raise UserError(f"model.dim={dim}, model.heads={heads} do not divide", "make dim a multiple of heads")
    return nn.ModuleList(
        Block(
            nn.LayerNorm(dim),
            Attention(dim, heads, heads, True, dropout, causal),
            nn.LayerNorm(dim),
            GELU(dim, 4 * dim, True),
            dropout,
        )
        for _ in range(layers)
    )
