"""Decoder-only transformer in the shapes of GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.models.counter_init import without_default_init
from trainer.models.documents import document_mask, documents_of, positions_of
from trainer.models.layers import GELU, Attention, Block, SwiGLU, init_transformer
from trainer.models.linear_cross_entropy import Losses, LossHead, output_of
from trainer.models.rotary import Rotary

NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
"""`layer`: LayerNorm (Ba et al. 2016); `rms`: RMSNorm (Zhang and Sennrich 2019)."""
CHOICES = {"norm": tuple(NORMS), "activation": ("gelu", "swiglu"), "positions": ("learned", "rotary")}


class Transformer(nn.Module):
    """Decoder-only transformer: `(batch, length)` token ids to `(batch, length, vocab_size)` logits.

    Each position attends to itself and those before it.

    Args:
        vocab_size: Number of token ids.
        sequence_length: Longest input.
        dim: Size of a feature vector.
        layers: Number of blocks.
        heads: Number of query heads.
        kv_heads: Number of key and value heads, shared by groups of query heads (grouped-query attention, Ainslie et
            al. 2023); None: `heads`.
        ffn_dim: Size of the feed-forward's hidden layer; None: `4 dim` for gelu, and `8/3 dim` rounded up to a multiple
            of 32 for swiglu, which has as many weights.
        norm: `layer` or `rms`.
        norm_eps: Epsilon of the norms.
        activation: `gelu` or `swiglu`.
        positions: `learned` position embeddings (GPT-2), or `rotary` (Su et al. 2021).
        rope_theta: Base of the rotary wavelengths.
        bias: Whether the linear layers have biases.
        tied: Whether the output layer shares the weights of the embedding.
        dropout: Dropout probability.
        document_end: Token that ends a document: positions attend only within their document, and learned positions
            count from its beginning. None: documents in one sequence see those before them. The data sets it if
            `data.document_mask` is true.

    Raises:
        UserError: A choice is unknown, or the sizes do not divide.
    """

    computes_loss = True
    """Whether `forward` takes targets and then returns the sums of their losses."""
    for_tasks = ("trainer.tasks.language_modelling.LanguageModelling",)

    @without_default_init()  # `init_weights` draws them
    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        *,
        dim: int = 256,
        layers: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        ffn_dim: int | None = None,
        norm: Literal["layer", "rms"] = "rms",
        norm_eps: float = 1e-5,
        activation: Literal["gelu", "swiglu"] = "swiglu",
        positions: Literal["learned", "rotary"] = "rotary",
        rope_theta: float = 10_000.0,
        bias: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
        document_end: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        _check_sizes(dim, heads, kv_heads)
        _check_choices({"norm": norm, "activation": activation, "positions": positions})
        self.layers, self.tied, self.document_end, self.attention_dropout = layers, tied, document_end, dropout
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(sequence_length, dim) if positions == "learned" else None
        self.rotary = Rotary(dim // heads, sequence_length, rope_theta) if positions == "rotary" else None
        self.dropout = nn.Dropout(dropout)
        width = ffn_dim or (4 * dim if activation == "gelu" else -(-8 * dim // 3 // 32) * 32)
        self.body = nn.ModuleList(
            Block(
                NORMS[norm](dim, eps=norm_eps),
                Attention(dim, heads, kv_heads, bias=bias, dropout=dropout),
                NORMS[norm](dim, eps=norm_eps),
                GELU(dim, width, bias) if activation == "gelu" else SwiGLU(dim, width, bias),
                dropout,
            )
            for _ in range(layers)
        )
        self.norm = NORMS[norm](dim, eps=norm_eps)
        self.head = LossHead(dim, vocab_size)
        self.tie()
        self.init_weights()

    def tie(self) -> None:
        """Tie the output layer to the embedding.

        Also needed after `to_empty`, which gives each of two tied parameters its own tensor.
        """
        if self.tied:
            self.head.weight = self.embedding.weight

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one and activation checkpointing recomputes."""
        return list(self.body)

    def outside_blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the layers before and after the blocks that a sharding strategy may gather only while they are called.

        The weights of learned positions are also read directly.
        """
        return [self.embedding], [self.norm, self.head]

    def tensor_parallel(self) -> dict[str, str]:
        """Return the layers that tensor parallelism splits: whole attention heads, and columns of the feed-forward."""
        names = {"attention": ("query", "key", "value"), "ffn": ("gate", "up")}
        columns = {f"body.*.{part}.{name}": "column" for part, layers in names.items() for name in layers}
        head = {} if self.tied else {"head": "vocabulary"}
        return {**columns, **head, "body.*.attention.out": "row", "body.*.ffn.down": "row"}

    def sequence_parallel(self) -> dict[str, str]:
        """Return where `strategy.sequence_parallel` splits the sequence: from the embeddings to the last norm."""
        norms = {"body.*.attention_norm": "norm", "body.*.ffn_norm": "norm", "norm": "norm_join"}
        return {"dropout": "split", **norms, "body.*.attention": "join", "body.*.ffn": "join"}

    def flops_per_token(self, sequence_length: int) -> int:
        """Return the FLOPs of training on one token: `6 N + 12 L d T` (Chowdhery et al. 2022, PaLM, appendix B).

        N: parameters without position embeddings and an untied input embedding, which are looked up, not multiplied.
        L layers of width d, T: `sequence_length`; attention is counted as if no position were masked.

        Args:
            sequence_length: Tokens of a sample.
        """
        looked_up = [self.positions, None if self.tied else self.embedding]
        skipped = {id(layer.weight) for layer in looked_up if layer is not None}
        # `ds_numel`: under DeepSpeed ZeRO-3 this rank may hold no more than a shard.
        sizes = [getattr(one, "ds_numel", one.numel()) for one in self.parameters() if id(one) not in skipped]
        return 6 * sum(sizes) + 12 * self.layers * self.embedding.embedding_dim * sequence_length

    def init_weights(self) -> None:
        """Initialise the weights as GPT-2; completes a model that was built on the meta device."""
        init_transformer(self, self.layers)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | Losses:
        """Map `(batch, length)` token ids to `(batch, length, vocab_size)` logits.

        With `(batch, length)` targets: to the sums of their losses, without all logits in memory.
        """
        length = tokens.shape[1]
        documents = None if self.document_end is None else documents_of(tokens, self.document_end)
        features = self.embedding(tokens)
        if self.positions is not None and documents is not None:
            features = features + self.positions(positions_of(documents))
        elif self.positions is not None:
            features = features + self.positions.weight[:length]
        features = self.dropout(features)
        # Rotary embeddings are relative: they need not count from the beginning of a document.
        rotary = self.rotary.cos_sin(length) if self.rotary is not None else None
        mask = None if documents is None else document_mask(documents, flex=self._uses_flex(tokens))
        for block in self.body:
            features = block(features, rotary, mask)
        return output_of(self.head, self.norm(features), targets)

    def _uses_flex(self, tokens: Tensor) -> bool:
        """Return whether documents are masked by flex attention, which knows no dropout."""
        return tokens.is_cuda and not (self.training and self.attention_dropout)


def _check_sizes(dim: int, heads: int, kv_heads: int) -> None:
    if dim % heads or heads % kv_heads:
        raise UserError(
            f"model.dim={dim}, model.heads={heads}, model.kv_heads={kv_heads}: not divisible",
            "make dim a multiple of heads, and heads a multiple of kv_heads",
        )


def _check_choices(given: dict[str, str]) -> None:
    for key, value in given.items():
        if value not in CHOICES[key]:
            raise UserError(f"model.{key}={value}: unknown {key}", f"use {' or '.join(CHOICES[key])}")
