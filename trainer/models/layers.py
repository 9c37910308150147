"""Layers of a transformer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from trainer.models import counter_init
from trainer.models.documents import Mask, attention
from trainer.models.rotary import Rotary, apply_rotary


class ResidualLinear(nn.Linear):
    """The last linear layer of a branch, which writes to the residual stream; it is initialised smaller."""


class Block(nn.Module):
    """A pre-norm transformer block: attention, then feed-forward, each added to the residual stream (GPT-2).

    Args:
        attention_norm: Norm before the attention.
        attention: Called with features, rotary cosines and sines, and a mask.
        ffn_norm: Norm before the feed-forward.
        ffn: Feed-forward network.
        dropout: Dropout probability of both branches.
    """

    def __init__(
        self, attention_norm: nn.Module, attention: nn.Module, ffn_norm: nn.Module, ffn: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, features: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Mask | None = None
    ) -> Tensor:
        """Return features of the same shape.

        Args:
            features: Tensor of shape `(batch, length, dim)`.
            rotary: Cosines and sines of shape `(length, head_dim)`; None: no rotary embedding.
            mask: The pairs of positions that attend; None: all, or those before if the attention is causal.
        """
        features = features + self.dropout(self.attention(self.attention_norm(features), rotary, mask))
        output: Tensor = features + self.dropout(self.ffn(self.ffn_norm(features)))
        return output


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernel: `softmax(Q K^T / sqrt(head_dim)) V`.

    Source: Vaswani et al. 2017, section 3.2; grouped-query attention: Ainslie et al. 2023.

    Args:
        dim: Size of a feature vector.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; divides `heads`.
        bias: Whether the linear layers have biases.
        dropout: Dropout probability of the attention weights.
        causal: Whether a position attends only to itself and those before it.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, *, bias: bool, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.heads, self.kv_heads, self.head_dim, self.dropout = heads, kv_heads, dim // heads, dropout
        self.query = nn.Linear(dim, heads * self.head_dim, bias)
        self.key = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.value = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.out = ResidualLinear(heads * self.head_dim, dim, bias)

    def forward(
        self, features: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Mask | None = None
    ) -> Tensor:
        """Return features of the same shape.

        Args:
            features: Tensor of shape `(batch, length, dim)`.
            rotary: Cosines and sines of shape `(length, head_dim)`; None: no rotary embedding.
            mask: The pairs of positions that attend; None: all, or those before if the attention is causal.
        """
        batch, length, _ = features.shape
        # -1: with tensor parallelism each rank has some of the heads
        query = self.query(features).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key = self.key(features).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value = self.value(features).view(batch, length, -1, self.head_dim).transpose(1, 2)
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, mask, causal=self.causal, dropout=dropout)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class GELU(nn.Module):
    """Feed-forward network with GELU: `down(gelu(up(x)))`. Hendrycks and Gimpel 2016.

    Args:
        dim: Size of a feature vector.
        width: Size of the hidden layer.
        bias: Whether the linear layers have biases.
        approximate: `tanh` as in GPT-2, or `none` as in ViT.
    """

    def __init__(self, dim: int, width: int, bias: bool, approximate: Literal["none", "tanh"] = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.up = nn.Linear(dim, width, bias)
        self.down = ResidualLinear(width, dim, bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, length, dim)` features to the same shape."""
        output: Tensor = self.down(functional.gelu(self.up(features), approximate=self.approximate))
        return output


class SwiGLU(nn.Module):
    """Llama's feed-forward network: `down(silu(gate(x)) * up(x))`. Shazeer 2020, "GLU Variants Improve Transformer".

    Args:
        dim: Size of a feature vector.
        width: Size of the hidden layer.
        bias: Whether the linear layers have biases.
    """

    def __init__(self, dim: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias)
        self.up = nn.Linear(dim, width, bias)
        self.down = ResidualLinear(width, dim, bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, length, dim)` features to the same shape."""
        output: Tensor = self.down(functional.silu(self.gate(features)) * self.up(features))
        return output


def init_transformer(model: nn.Module, layers: int) -> None:
    """Initialise a transformer as GPT-2 (Radford et al. 2019, section 2.3).

    Normal with standard deviation 0.02, divided by sqrt(2 layers) in layers that write to the residual stream. Also
    fills the buffers, so it completes a model that was built on the meta device.

    Args:
        model: The transformer.
        layers: Number of its blocks.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            residual = isinstance(module, ResidualLinear)
            counter_init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, Rotary)):
            module.reset_parameters()
