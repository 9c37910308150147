"""What a rank computes and moves in a step of our decoder, in closed form. Imports no torch.

The operators of `models/transformer.py` are those that run eagerly. n: tokens of a micro-batch; d: `model.dim`; w: the
width of the feed-forward network; c: bytes of an element of the matrix products; r: of the residual stream.
"""

from __future__ import annotations

import math

from trainer.plan.closed_form import CHUNK_BYTES, Case
from trainer.plan.decoder import Decoder
from trainer.plan.work import Counts, Work

_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5
"""Matrix products of fused attention: the backward pass computes the scores again (Dao et al. 2022, section 3.1)."""


def work_of(case: Case) -> Work:
    """Return the operations of a micro-batch and of the update."""
    one = _Decoder(case)
    model, layers = case.model, case.model.layers
    forward = one.block_forward() * layers + one.head_forward()
    again = one.block_forward() if case.checkpointing != "none" else Counts()
    if case.checkpointing == "selective":  # the results of the matrix products are kept
        again = Counts(0.0, 0.0, again.other_bytes, again.operators)
    backward = (one.block_backward() + again) * layers + one.head_backward()
    elements = sum(math.prod(parameter.shape) for parameter in model.parameters())
    length = case.length or model.sequence_length
    return Work(
        forward,
        backward,
        one.update(),
        elements,
        elements,
        layers + (1 if model.tied else 3),
        case.batch,
        length,
        flops_per_token(model, length) * length,
    )


def flops_per_token(model: Decoder, length: int) -> float:
    """Return `6 N + 12 L d T` (Chowdhery et al. 2022, PaLM, appendix B), as `Transformer.flops_per_token` does."""
    looked_up = {"positions.weight"} | (set() if model.tied else {"embedding.weight"})
    elements = sum(math.prod(one.shape) for one in model.parameters() if one.name not in looked_up)
    return 6.0 * elements + 12.0 * model.layers * model.dim * length


class _Decoder:
    def __init__(self, case: Case) -> None:
        self.case, model, layout = case, case.model, case.layout
        self.n = case.batch * (case.length or model.sequence_length)
        self.c, self.r = layout.compute_bytes, layout.weight_bytes
        self.mixed = layout.precision.endswith("mixed")
        self.nd, self.nw = self.n * model.dim, self.n * model.width
        self.rotated = self.n * (model.dim + model.kv_dim) if model.positions == "rotary" else 0
        self.matrices = sum(math.prod(one.shape) for one in model.block() if one.is_hidden)
        self.block_elements = sum(math.prod(one.shape) for one in model.block())
        self.inputs = 5 if model.is_gated else 4
        """Linear layers of a block whose inputs are the output of a norm."""
        self.biased = self.n * (2 * model.dim + 2 * model.kv_dim + model.dim + model.width) if model.bias else 0
        self.share = 1 / layout.tensor

    def block_forward(self) -> Counts:
        """Return the forward pass of a block."""
        c, r, nd, model = self.c, self.r, self.nd, self.case.model
        norms = 2 * self._norm_forward()
        casts = self.inputs * (r + c) * nd if self.mixed else 0
        rotary = self.rotated * (24 + 6 * c if c < 4 else 40)
        residual = 2 * (2 * r + c) * nd
        dropout = 2 * (2 * c + 1) * nd if model.dropout else 0
        hidden = (5 if model.is_gated else 2) * c * self.nw
        other = norms + casts + rotary + residual + dropout + hidden + self._weights(6 if self.mixed else 0)
        operators = 2 + (self.inputs + 2 + (self.inputs + 2 if self.mixed else 0)) + (14 if self.rotated else 0)
        operators += 1 + 2 + (2 if model.is_gated else 1) + (2 if model.dropout else 0)
        return Counts(*self._products(2, _FORWARD_PRODUCTS), other, operators)

    def block_backward(self) -> Counts:
        """Return the backward pass of a block, without what is computed again."""
        c, r, nd, model = self.c, self.r, self.nd, self.case.model
        norms = 2 * self._norm_backward()
        casts = (self.inputs + 2) * (r + c) * nd if self.mixed else 0
        rotary = self.rotated * ((4 + c) + 16 + 2 * (4 + c) + 6 * c if c < 4 else 48)
        sums = (self.inputs - 2 + 2) * 3 * r * nd
        dropout = 2 * (2 * c + 1) * nd if model.dropout else 0
        hidden = (9 if model.is_gated else 3) * c * self.nw
        other = norms + casts + rotary + sums + dropout + hidden + c * self.biased
        other += self._weights(6 if self.mixed else 0) + self._reduced()
        operators = 2 + 2 * (self.inputs + 2) + (2 * (self.inputs + 2) if self.mixed else 0)
        operators += (18 if self.rotated else 0) + 1 + self.inputs + (3 if model.is_gated else 1)
        return Counts(*self._products(4, _BACKWARD_PRODUCTS), other, operators)

    def head_forward(self) -> Counts:
        """Return the embedding, the last norm and the loss, whose gradient is computed with it if it is chunked."""
        c, model, n = self.c, self.case.model, self.n
        logits, weight, chunks = n * model.vocab_size, model.vocab_size * model.dim, self._chunks()
        other = 2 * self.r * self.nd + self._norm_forward()
        if self.case.layout.is_sharded:  # what FSDP2 gathers outside the blocks
            other += 2 * c * (weight if model.tied else 2 * weight)
        widening = c + 4 if c < 4 else 0
        times = 3 if chunks > 1 else 1
        flops = 2.0 * times * logits * model.dim
        moved = times * c * (logits + self.nd) + times * c * weight * chunks
        if chunks > 1:
            other += logits * (widening + 8 + 8 + widening) + chunks * weight * (8 + c)
            other += 4 * self.nd * c
        else:
            other += logits * (widening + 8)
        other += (self.r + c) * (weight + self.nd) if self.mixed else 0
        return Counts(flops * self.share, moved, other * self.share, 12 * chunks + 12)

    def head_backward(self) -> Counts:
        """Return the backward pass of the loss, of the last norm and of the embedding."""
        c, r, model, n = self.c, self.r, self.case.model, self.n
        logits, weight = n * model.vocab_size, model.vocab_size * model.dim
        other = self._norm_backward() + r * weight * (4 if model.tied else 1)
        if self.case.layout.is_sharded:
            other += (c + self.case.reduce_bytes) * (weight if model.tied else 2 * weight)
        if self._chunks() > 1:
            other += 3 * c * self.nd + 2 * r * weight
            return Counts(0.0, 0.0, other * self.share, 12)
        widening = c + 4 if c < 4 else 0
        other += logits * (4 + 12 + widening) + ((r + c) * (weight + self.nd) if self.mixed else 0)
        flops = 4.0 * logits * model.dim
        return Counts(flops * self.share, 2 * c * (logits + weight + self.nd), other * self.share, 16)

    def update(self) -> Counts:
        """Return clipping and the optimizer: gradients and states are read, states and parameters are written."""
        layout = self.case.layout
        parameters = list(self.case.model.parameters())
        local = sum(math.prod(layout.local(one)) for one in parameters)
        if layout.zero_stage:
            local = -(-local // layout.world_size)
        return Counts(0.0, 0.0, local * 11.0 * layout.weight_bytes, 2 * len(parameters) + 4)

    def _products(self, times: int, attention: int) -> tuple[float, float]:
        """Return FLOPs and bytes of the matrix products of a block; `times`: FLOPs for each weight and token."""
        model, length = self.case.model, self.case.length or self.case.model.sequence_length
        pairs = self.n * length * 0.5
        flops = float(times * self.n * self.matrices + 2 * attention * pairs * model.dim)
        features = self.inputs * self.nd + 3 * self.nw + 2 * self.nd + 2 * self.n * model.kv_dim
        moved = times // 2 * self.c * (self.matrices + features) + self.c * (2 * attention) * self.nd
        return flops * self.share, moved * self.share

    def _norm_forward(self) -> float:
        composite = self.case.model.norm == "rms" and self.case.device == "cpu"
        return self.nd * self.r * (11 if composite else 2)

    def _norm_backward(self) -> float:
        composite = self.case.model.norm == "rms" and self.case.device == "cpu"
        return self.nd * self.r * (21 if composite else 3)

    def _weights(self, casting: int) -> float:
        """Return the bytes of casting a block's weights by autocast, or of copying what FSDP2 has gathered."""
        if self.case.layout.is_sharded:
            return 2.0 * self.c * self.block_elements
        return float(casting * self.matrices)

    def _reduced(self) -> float:
        if not self.case.layout.is_sharded:
            return 0.0
        return float((self.c + self.case.reduce_bytes) * self.block_elements)

    def _chunks(self) -> int:
        if not self.case.chunked:
            return 1
        most = max(1, CHUNK_BYTES[self.case.device] // (4 * self.case.model.vocab_size))
        return -(-self.n // most)
