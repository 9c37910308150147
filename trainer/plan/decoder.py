"""The sizes of our decoder-only transformer and its parameters, from the section `model`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

TARGET = "trainer.models.transformer.Transformer"
Group = Literal["before", "block", "after", "root"]
"""What FSDP shards together: the embedding, each block, the layers after them, and the rest (`fsdp_layout.py`)."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model."""

    name: str
    shape: tuple[int, ...]
    group: Group
    split: int | None = None
    """Dimension that tensor parallelism splits; None: whole on each rank."""
    is_hidden: bool = False
    """Whether it is the weight of a linear layer in a block, which Muon orthogonalizes."""


@dataclass(frozen=True)
class Decoder:
    """The arguments of `trainer.models.transformer.Transformer`, with its defaults."""

    vocab_size: int
    sequence_length: int
    dim: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    ffn_dim: int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "swiglu"
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    bias: bool = False
    tied: bool = True
    dropout: float = 0.0
    document_end: int | None = None

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Decoder | None:
        """Return the model of the section `model`; None if it is another one, or its sizes come from the data."""
        given = {key: value for key, value in node.items() if not key.startswith("_")}
        known = {one.name for one in fields(cls)}
        if node.get("_target_") != TARGET or not set(given) <= known:
            return None
        if given.get("vocab_size") is None or given.get("sequence_length") is None:
            return None
        return cls(**given)

    @property
    def kv_dim(self) -> int:
        """Features of the keys, and of the values."""
        return self.dim // self.heads * (self.kv_heads or self.heads)

    @property
    def width(self) -> int:
        """Size of the hidden layer of the feed-forward network."""
        default = 4 * self.dim if self.activation == "gelu" else -(-8 * self.dim // 3 // 32) * 32
        return self.ffn_dim or default

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network has a gate."""
        return self.activation == "swiglu"

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters in the order of the module; a tied one once."""
        outside: Group = "root" if self.tied else "before"
        yield Parameter("embedding.weight", (self.vocab_size, self.dim), outside)
        if self.positions == "learned":
            yield Parameter("positions.weight", (self.sequence_length, self.dim), "root")
        for index in range(self.layers):
            yield from self._block(f"body.{index}")
        after: Group = "root" if self.tied else "after"
        yield from self._norm("norm", after)
        if not self.tied:
            yield Parameter("head.weight", (self.vocab_size, self.dim), after)

    def block(self) -> list[Parameter]:
        """Return the parameters of one block."""
        return list(self._block("body.0"))

    def buffer_bytes(self) -> int:
        """Return the bytes of the rotary angles, which are float32 in any precision."""
        return 8 * self.sequence_length * (self.dim // self.heads) if self.positions == "rotary" else 0

    def _block(self, prefix: str) -> Iterator[Parameter]:
        yield from self._norm(f"{prefix}.attention_norm", "block")
        for name, rows in (("query", self.dim), ("key", self.kv_dim), ("value", self.kv_dim)):
            yield from self._linear(f"{prefix}.attention.{name}", rows, self.dim, 0)
        yield from self._linear(f"{prefix}.attention.out", self.dim, self.dim, 1)
        yield from self._norm(f"{prefix}.ffn_norm", "block")
        for name in ("gate", "up") if self.is_gated else ("up",):
            yield from self._linear(f"{prefix}.ffn.{name}", self.width, self.dim, 0)
        yield from self._linear(f"{prefix}.ffn.down", self.dim, self.width, 1)

    def _norm(self, name: str, group: Group) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (self.dim,), group)
        if self.norm == "layer":
            yield Parameter(f"{name}.bias", (self.dim,), group)

    def _linear(self, name: str, rows: int, columns: int, split: int) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (rows, columns), "block", split, is_hidden=True)
        if self.bias:
            yield Parameter(f"{name}.bias", (rows,), "block", 0 if split == 0 else None)
