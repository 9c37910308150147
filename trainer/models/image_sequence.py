"""Image to sequence and sequence to image: one transformer over patches and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.models.layers import GELU, Attention, Block, init_transformer


class ImageToSequence(nn.Module):
    """Images and the tokens so far to the logits of the next tokens.

    `(batch, channels, height, width)` and `(batch, length)` to `(batch, length, vocab_size)`.

    The patches of the image precede the tokens in one causal transformer (as in Fuyu, Bavishi et al. 2023): each
    token attends to the whole image and the tokens before it.

    Args:
        input_shape: Channels, height and width of an image.
        vocab_size: Number of token ids.
        sequence_length: Longest sequence.
        patch: Height and width of a patch in pixels.
        dim: Size of a feature vector.
        layers: Number of blocks.
        heads: Number of attention heads.
        dropout: Dropout probability.
    """

    for_tasks = ("trainer.tasks.image_to_sequence.ImageToSequence",)

    def __init__(
        self,
        input_shape: Sequence[int],
        vocab_size: int,
        sequence_length: int,
        *,
        patch: int = 4,
        dim: int = 64,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
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
        """Return the modules that a sharding strategy wraps one by one."""
        return list(self.body)

    def init_weights(self) -> None:
        """Initialise the weights as GPT-2, and those of the patches with torch's default."""
        init_transformer(self, self.layers)
        self.patch.reset_parameters()

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens, shape `(batch, length, vocab_size)`.

        Args:
            images: Tensor of shape `(batch, channels, height, width)`.
            tokens: The tokens so far, shape `(batch, length)`.
        """
        patches = self.patch(images).flatten(2).transpose(1, 2)
        features = torch.cat((patches, self.embedding(tokens)), 1)
        features = features + self.positions.weight[: features.shape[1]]
        for block in self.body:
            features = block(features)
        logits: Tensor = self.head(self.norm(features[:, self.patches :]))
        return logits


class SequenceToImage(nn.Module):
    """`(batch, length)` tokens to `(batch, channels, height, width)` images.

    A learned query for each patch follows the tokens in one bidirectional transformer, and becomes the pixels of
    its patch. All patches are predicted at once: if several images fit the tokens, the output is their mean.

    Args:
        output_shape: Channels, height and width of an image.
        vocab_size: Number of token ids.
        sequence_length: Longest sequence.
        patch: Height and width of a patch in pixels.
        dim: Size of a feature vector.
        layers: Number of blocks.
        heads: Number of attention heads.
        dropout: Dropout probability.
    """

    for_tasks = ("trainer.tasks.sequence_to_image.SequenceToImage",)

    def __init__(
        self,
        output_shape: Sequence[int],
        vocab_size: int,
        sequence_length: int,
        *,
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
        """Return the modules that a sharding strategy wraps one by one."""
        return list(self.body)

    def init_weights(self) -> None:
        """Initialise the weights as GPT-2; completes a model that was built on the meta device."""
        init_transformer(self, self.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(batch, length)` tokens to `(batch, channels, height, width)` images."""
        batch, length = tokens.shape
        queries = self.positions.weight[self.length :].expand(batch, -1, -1)
        features = torch.cat((self.embedding(tokens) + self.positions.weight[:length], queries), 1)
        for block in self.body:
            features = block(features)
        pixels = self.head(self.norm(features[:, length:]))
        rows, columns = self.height // self.size, self.width // self.size
        cells = pixels.view(batch, rows, columns, self.channels, self.size, self.size)
        images: Tensor = cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, self.channels, self.height, self.width)
        return images


def _grid(height: int, width: int, patch: int) -> int:
    if height % patch or width % patch:
        raise UserError(
            f"model.patch={patch} does not divide images of {height}x{width}", "use a patch that divides both sides"
        )
    return (height // patch) * (width // patch)


def _blocks(dim: int, layers: int, heads: int, dropout: float, causal: bool) -> nn.ModuleList:
    if dim % heads:
        raise UserError(f"model.dim={dim}, model.heads={heads}: not divisible", "make dim a multiple of heads")
    return nn.ModuleList(
        Block(
            nn.LayerNorm(dim),
            Attention(dim, heads, heads, bias=True, dropout=dropout, causal=causal),
            nn.LayerNorm(dim),
            GELU(dim, 4 * dim, bias=True),
            dropout,
        )
        for _ in range(layers)
    )
