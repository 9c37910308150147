"""Decoder-only transformer in the shapes of GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.models.layers import GELU, Attention, Block, SwiGLU, init_transformer
from trainer.models.rotary import Rotary

NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
ACTIVATIONS = ("gelu", "swiglu")
POSITIONS = ("learned", "rotary")


class Transformer(nn.Module):
    """(n, length) token ids to (n, length, vocab_size) logits; each position sees itself and those before it."""

    for_tasks = ("trainer.tasks.language_modelling.LanguageModelling",)

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        dim: int = 256,
        layers: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        ffn_dim: int | None = None,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        activation: str = "swiglu",
        positions: str = "rotary",
        rope_theta: float = 10_000.0,
        bias: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        """`kv_heads`: heads of keys and values, shared by groups of query heads (Ainslie et al. 2023); null: `heads`.

        `ffn_dim`: null: 4 dim for gelu; for swiglu 8/3 dim, which has as many weights. `tied`: the output layer
        is the embedding. `sequence_length`: the longest input.
        """
        super().__init__()
        kv_heads = kv_heads or heads
        _check(dim, heads, kv_heads, norm, activation, positions)
        self.layers, self.tied = layers, tied
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(sequence_length, dim) if positions == "learned" else None
        self.rotary = Rotary(dim // heads, sequence_length, rope_theta) if positions == "rotary" else None
        self.dropout = nn.Dropout(dropout)
        width = ffn_dim or (4 * dim if activation == "gelu" else -(-8 * dim // 3 // 32) * 32)
        self.body = nn.ModuleList(
            Block(
                NORMS[norm](dim, eps=norm_eps),
                Attention(dim, heads, kv_heads, bias, dropout),
                NORMS[norm](dim, eps=norm_eps),
                GELU(dim, width, bias) if activation == "gelu" else SwiGLU(dim, width, bias),
                dropout,
            )
            for _ in range(layers)
        )
        self.norm = NORMS[norm](dim, eps=norm_eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.tie()
        self.init_weights()

    def tie(self) -> None:
        """Also needed after `to_empty`, which gives each of two tied parameters a tensor of its own."""
        if self.tied:
            self.head.weight = self.embedding.weight

    def blocks(self) -> list[nn.Module]:
        """What a sharding strategy wraps one by one, and what activation checkpointing recomputes."""
        return list(self.body)

    def tensor_parallel(self) -> dict[str, str]:
        """Layers that a tensor parallel strategy splits: whole heads of attention, columns of the feed-forward."""
        names = {"attention": ("query", "key", "value"), "ffn": ("gate", "up")}
        columns = {f"body.*.{part}.{name}": "column" for part, layers in names.items() for name in layers}
        return {**columns, "body.*.attention.out": "row", "body.*.ffn.down": "row"}

    def init_weights(self) -> None:
        """GPT-2's; completes a model made on the meta device."""
        init_transformer(self, self.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        features = self.embedding(tokens)
        if self.positions is not None:
            features = features + self.positions.weight[:length]
        features = self.dropout(features)
        angles = self.rotary.angles(length) if self.rotary is not None else None
        for block in self.body:
            features = block(features, angles)
        return self.head(self.norm(features))


def _check(dim: int, heads: int, kv_heads: int, norm: str, activation: str, positions: str) -> None:
    if dim % heads or heads % kv_heads:
        raise UserError(
            f"model.dim={dim}, model.heads={heads}, model.kv_heads={kv_heads} do not divide",
            "make dim a multiple of heads, and heads one of kv_heads",
        )
    for key, value, known in (
        ("norm", norm, tuple(NORMS)),
        ("activation", activation, ACTIVATIONS),
        ("positions", positions, POSITIONS),
    ):
        if value not in known:
            raise UserError(f"model.{key}={value} is not known", f"use {' or '.join(known)}")
