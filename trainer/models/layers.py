"""The parts of a transformer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from trainer.models.rotary import Rotary


class ResidualLinear(nn.Linear):
    """The last layer of a branch."""


class Block(nn.Module):
    """Attention, then feed-forward, each on normalised input and added to the residual stream."""

    def __init__(
        self, attention_norm: nn.Module, attention: nn.Module, ffn_norm: nn.Module, ffn: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        features = features + self.dropout(self.attention(self.attention_norm(features), angles))
        return features + self.dropout(self.ffn(self.ffn_norm(features)))


class Attention(nn.Module):
    """Self-attention through torch's fused kernel."""

    def __init__(self, dim: int, heads: int, kv_heads: int, bias: bool, dropout: float, causal: bool = True) -> None:
        """`causal`: a position sees itself and those before it only."""
        super().__init__()
        self.causal = causal
        self.heads, self.kv_heads, self.size, self.dropout = heads, kv_heads, dim // heads, dropout
        self.query = nn.Linear(dim, heads * self.size, bias)
        self.key = nn.Linear(dim, kv_heads * self.size, bias)
        self.value = nn.Linear(dim, kv_heads * self.size, bias)
        self.out = ResidualLinear(heads * self.size, dim, bias)

    def forward(self, features: Tensor, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        number, length, _ = features.shape
        # -1: tensor parallel leaves each rank some of the heads
        query = self.query(features).view(number, length, -1, self.size).transpose(1, 2)
        key = self.key(features).view(number, length, -1, self.size).transpose(1, 2)
        value = self.value(features).view(number, length, -1, self.size).transpose(1, 2)
        if angles is not None:
            query, key = Rotary.turn(query, angles), Rotary.turn(key, angles)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.out(mixed.transpose(1, 2).reshape(number, length, -1))


class GELU(nn.Module):
    """The feed-forward of GPT-2, with its `tanh` approximation, and of ViT (`none`)."""

    def __init__(self, dim: int, width: int, bias: bool, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.up = nn.Linear(dim, width, bias)
        self.down = ResidualLinear(width, dim, bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(features), approximate=self.approximate))


class SwiGLU(nn.Module):
    """Llama's feed-forward (Shazeer 2020)."""

    def __init__(self, dim: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias)
        self.up = nn.Linear(dim, width, bias)
        self.down = ResidualLinear(width, dim, bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(features)) * self.up(features))


def init_transformer(model: nn.Module, layers: int) -> None:
    """Normal with deviation 0.02, and that over sqrt(2 layers) where a block writes to the residual stream:
    GPT-2's. Also fills the buffers, so that it completes a model made on the meta device."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            residual = isinstance(module, ResidualLinear)
            nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, Rotary)):
            module.reset_parameters()
