"""The memory of a training step of our decoder, in closed form: milliseconds, and no torch.

The bytes of each tensor are a formula of the sizes of the model, and the tensors of the forward pass, the backward pass
and the update are added up in their order. n: tokens of a micro-batch; d: `model.dim`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.plan import gloo
from trainer.plan.decoder import Decoder, Parameter
from trainer.plan.ledger import Ledger
from trainer.plan.parts import BUCKETS, COPIES, GRADIENTS, LOGITS, OPTIMIZER, PARAMETERS, REST
from trainer.plan.states import Layout, States, states
from trainer.plan.work import Work

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**30}
"""As in `models/linear_cross_entropy.py`, which imports torch."""


class NoFormula(Exception):
    """The job has no closed form: it is planned by simulation."""


@dataclass(frozen=True)
class Case:
    """A decoder, its micro-batch, and how it is trained."""

    model: Decoder
    batch: int
    """Samples of a micro-batch of a rank."""
    layout: Layout
    optimizer: Mapping[str, Any]
    length: int | None = None
    """Tokens of a sample; None: `model.sequence_length`."""
    checkpointing: str = "none"
    device: str = "cuda"
    accumulates: bool = False
    chunked: bool = True
    """`task.chunked_loss`."""
    prefetch: int = 1
    reshards: bool = True
    """`strategy.reshard_after_forward`."""
    reduce_bytes: int = 4
    """Bytes of an element in the reduction of gradients of FSDP2."""
    frozen: frozenset[str] = frozenset()
    offloads: bool = False
    """`strategy.cpu_offload`: shards, gradients and optimizer states are in host memory."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on rank 0."""

    peak: int
    parts: dict[str, int]
    where: str
    states: States
    work: Work = field(default_factory=Work)


def estimate(case: Case) -> Estimate:
    """Return the peak of the second step, which has the optimizer states from its beginning.

    Raises:
        NoFormula: The case has no closed form.
    """
    reason = _why_not(case)
    if reason is not None:
        raise NoFormula(reason)
    try:
        known = states(case.model.parameters(), case.layout, case.optimizer, set(case.frozen))
    except NotImplementedError as error:
        raise NoFormula(str(error)) from None
    return _Step(case, known).run()


def _why_not(case: Case) -> str | None:
    layout, model = case.layout, case.model
    if layout.zero_stage:
        return f"the activations and buckets of {layout.strategy} have no formula"
    if layout.strategy == "tp" and layout.tensor > 1:
        return "the activations of tensor parallelism have no formula"
    if case.frozen:
        return "the activations of a model with frozen parameters have no formula"
    if model.document_end is not None:
        return "the masks of documents have no formula"
    if model.dropout and case.device == "cpu":
        return "dropout in the attention of a CPU has no formula"
    if case.checkpointing == "selective":
        return "selective activation checkpointing has no formula"
    return None


class _Step:
    """Walks through a step, and adds up what it allocates."""

    def __init__(self, case: Case, known: States) -> None:
        self.case, self.known, self.ledger = case, known, Ledger()
        model, layout = case.model, case.layout
        self.tokens = case.batch * (case.length or model.sequence_length)
        self.compute, self.weight = layout.compute_bytes, layout.weight_bytes
        self.mixed = layout.precision.endswith("mixed")
        self.casts = self.mixed and not layout.is_sharded  # FSDP2 gathers the weights in the type of the products
        self.residual = self.weight * self.tokens * model.dim
        self.narrow = self.compute * self.tokens * model.dim
        self.hidden = self.compute * self.tokens * model.width
        self.keeps_buckets = layout.strategy == "ddp" and layout.world_size > 1
        outside = [one for one in model.parameters() if one.group != "block"]
        self.sizes: Counter[str] = Counter()
        """Elements of each group; of `block`, of one block."""
        self.padded: Counter[str] = Counter()
        """The same with the padding of the shards."""
        for one in [*outside, *model.block()]:
            self.sizes[one.group] += _numel(one)
            self.padded[one.group] += math.prod(layout.local(one)) * layout.shards
        self.buffer = 0
        """Bytes of the buffer of the last gathering in the forward pass."""
        self.reducing = 0
        """Bytes of the input of the last reduction, which FSDP2 keeps until the next one."""

    def run(self) -> Estimate:
        ledger = self.ledger
        if self.case.offloads:
            ledger.take(PARAMETERS, self.case.model.buffer_bytes())
            self._forward()
            self._backward()
            return Estimate(ledger.peak, ledger.at_peak, "passes", self.known)
        ledger.take(PARAMETERS, self.known.parameters + self.case.model.buffer_bytes())
        ledger.take(OPTIMIZER, self.known.optimizer)
        if self.keeps_buckets or self.case.accumulates:
            ledger.take(GRADIENTS, self.known.gradients)
        if self.keeps_buckets and self.case.accumulates:
            ledger.take(GRADIENTS, self.known.gradients)  # of the micro-batches before, which are not in the buckets
        self._forward()
        self._backward()
        passes = ledger.peak
        update = self.known.total + self.case.model.buffer_bytes() + self._update_bytes()
        if update > passes:
            parts = {
                PARAMETERS: self.known.parameters + self.case.model.buffer_bytes(),
                OPTIMIZER: self.known.optimizer,
            }
            parts |= {GRADIENTS: self.known.gradients}
            parts |= {REST: self._update_bytes()} if self._update_bytes() else {}
            return Estimate(update, parts, "update", self.known)
        return Estimate(passes, ledger.at_peak, "passes", self.known)

    # forward

    def _forward(self) -> None:
        case, ledger = self.case, self.ledger
        self._gather("root")
        ledger.take(REST, self._dropout_mask())  # what the embedding returns is the first block's input
        self._gather("before")
        self._release("before")
        for index in range(case.model.layers):
            is_last = index == case.model.layers - 1
            self._gather("block")
            self._block_forward()
            if not is_last and case.reshards:
                self._release("block")
            if case.checkpointing == "full":
                ledger.free(REST, self._saved())
                ledger.free(COPIES, self._copies())
                ledger.take(REST, self.residual)
        self._gather("after")
        self._head()

    def _block_forward(self) -> None:
        self.ledger.take(REST, self._saved())
        self.ledger.take(COPIES, self._copies())

    def _saved(self) -> int:
        """Return the bytes that a block keeps for its backward pass, without copies of weights."""
        model, n = self.case.model, self.tokens
        inputs = 3 * self.narrow if self.mixed else self.residual
        attention = 2 * self.narrow + 2 * self.compute * n * model.kv_dim + 4 * n * model.heads
        linear_inputs = (2 if model.is_gated else 1) * self.narrow if self.mixed else self.residual
        ffn = linear_inputs + (4 if model.is_gated else 2) * self.hidden
        return 2 * self._norm_saved() + inputs + attention + ffn + 2 * self._dropout_mask()

    def _norm_saved(self) -> int:
        """Return the bytes that a norm keeps: its input, and one or two numbers for each row."""
        rows = 4 * self.tokens * (1 if self.case.model.norm == "rms" else 2)
        composite = self.case.model.norm == "rms" and self.case.device == "cpu"
        several = 2 if self.weight >= 4 else 5  # in 16 bits its input and its quotient are kept in float32, too
        return self.residual * (several if composite else 1) + rows

    def _dropout_mask(self) -> int:
        return self.tokens * self.case.model.dim if self.case.model.dropout else 0

    def _copies(self) -> int:
        """Return the bytes of the copies of a block's weights that autocast keeps."""
        matrices = sum(_numel(one) for one in self.case.model.block() if one.is_hidden)
        return self.compute * matrices if self.casts else 0

    def _head(self) -> None:
        """Add the final norm, the loss, and the beginning of its backward pass."""
        model, ledger, n = self.case.model, self.ledger, self.tokens
        weight = model.vocab_size * model.dim
        ledger.take(REST, self._norm_saved())
        output = ledger.take(REST, self.residual)
        copy = ledger.take(COPIES, self.compute * weight if self.casts else 0)
        rows = self._rows()
        if rows == n:
            if self.mixed:
                ledger.free(REST, output)
                output = ledger.take(REST, self.narrow)
            self._forget_buffer()
            logits = ledger.take(LOGITS, 12 * n * model.vocab_size)
            ledger.free(LOGITS, logits)
            gradient = ledger.take(LOGITS, (8 if self.compute == 4 else 2) * n * model.vocab_size)
            self._weight_gradient(weight, "after")
            ledger.free(LOGITS, gradient)
            ledger.free(REST, output)
        else:
            ledger.take(REST, self.residual)
            wide = ledger.take(REST, 4 * weight)
            chunk = ledger.take(LOGITS, 12 * rows * model.vocab_size)  # with the gradient of the chunk before
            ledger.free(LOGITS, chunk)
            self._forget_buffer()
            part = ledger.take(LOGITS, self.compute * rows * model.vocab_size)
            product = ledger.take(REST, 0 if self.compute == 4 else self.compute * weight)
            ledger.free(REST, product)
            ledger.free(LOGITS, part)
            ledger.free(REST, output)
            own = self.compute if self.case.layout.is_sharded and self.mixed else self.weight
            narrower = ledger.take(REST, own * weight if own != 4 else 0)
            ledger.free(REST, wide if own != 4 else 0)
            self._keep_gradient(weight, "after", narrower or wide)
            ledger.free(REST, self.residual)
        ledger.free(COPIES, copy)
        ledger.take(REST, self.residual)  # the gradient of the residual stream, which the blocks pass on
        ledger.free(REST, self._norm_saved())

    def _rows(self) -> int:
        """Return the positions whose logits are in memory at once, as `rows_of_chunk` does."""
        if not self.case.chunked:
            return self.tokens
        most = max(1, CHUNK_BYTES[self.case.device] // (4 * self.case.model.vocab_size))
        return self.tokens if self.tokens <= most else -(-self.tokens // -(-self.tokens // most))

    # backward

    def _backward(self) -> None:
        case, ledger = self.case, self.ledger
        self._reduce("after")
        for index in reversed(range(case.model.layers)):
            if index != case.model.layers - 1 and case.reshards:
                self._arrive("block")
            if index and case.reshards and case.prefetch:
                ledger.take(BUCKETS, self._gathered("block"))  # the next group arrives while this one computes
            if case.checkpointing == "full":
                ledger.free(REST, self.residual)  # the input of the block is the first that it saves again
                self._block_forward()
            self._block_backward()
            self._reduce("block")
            if index and case.reshards and case.prefetch:
                ledger.free(BUCKETS, self._gathered("block"))
        self._embedding_backward()

    def _block_backward(self) -> None:
        model, ledger = self.case.model, self.ledger
        gate_up = [one for one in model.block() if ".ffn." in one.name and "down" not in one.name and one.is_hidden]
        down = model.width * model.dim
        gradient = ledger.take(REST, self.narrow if self.mixed else 0)
        product = ledger.take(REST, self.hidden)
        self._weight_gradient(down, "block")
        ledger.free(REST, self.hidden)  # the saved input of `down`
        self._free_copy(down)
        ledger.free(REST, gradient)
        if model.is_gated:
            ledger.take(REST, 2 * self.hidden)
            ledger.free(REST, product + 3 * self.hidden)  # two of the saved factors are now gradients
        else:
            ledger.take(REST, self.hidden)
            ledger.free(REST, product + self.hidden)
        for one in gate_up:
            into = ledger.take(REST, self.narrow)
            self._weight_gradient(_numel(one), "block")
            self._free_copy(_numel(one))
            ledger.free(REST, self.narrow if self.mixed else 0)
            ledger.free(REST, into)
        ledger.free(REST, (2 if model.is_gated else 1) * self.hidden + (0 if self.mixed else self.residual))
        rest = self._saved() - (4 if model.is_gated else 2) * self.hidden
        rest -= (2 if model.is_gated else 1) * self.narrow if self.mixed else self.residual
        ledger.take(REST, 2 * self.residual + 3 * self.narrow)
        ledger.free(REST, 2 * self.residual + 3 * self.narrow)
        for one in model.block():
            if ".attention." in one.name and one.is_hidden:
                self._weight_gradient(_numel(one), "block")
                self._free_copy(_numel(one))
        for one in model.block():
            if not one.is_hidden:
                self._keep_gradient(_numel(one), "block", 0)
        ledger.free(REST, rest)

    def _embedding_backward(self) -> None:
        ledger, model = self.ledger, self.case.model
        self._weight_gradient(model.vocab_size * model.dim, "root" if model.tied else "before", model.tied)
        ledger.free(REST, self.residual)
        self._reduce("before")
        self._reduce("root")

    def _weight_gradient(self, elements: int, group: str, is_second: bool = False) -> None:
        """Add the gradient of a weight: it is computed in the type of the products and kept in that of the weight."""
        ledger = self.ledger
        if self.casts:
            narrow = ledger.take(REST, self.compute * elements)
            wide = ledger.take(REST, self.weight * elements)
            ledger.free(REST, narrow)
        else:
            wide = ledger.take(REST, (self.compute if self.case.layout.is_sharded else self.weight) * elements)
        if is_second:
            ledger.free(REST, wide)
            return
        self._keep_gradient(elements, group, wide)

    def _keep_gradient(self, elements: int, group: str, temporary: int) -> None:
        """Hand a gradient over to its place; `temporary` bytes of it are counted among the activations."""
        ledger = self.ledger
        ledger.free(REST, temporary)
        if self.case.layout.is_sharded:
            ledger.take(BUCKETS, self.compute * elements)
        elif self.keeps_buckets:
            ledger.free(GRADIENTS, self.weight * elements if self.case.accumulates else 0)  # moved into its bucket
        elif self.case.accumulates:
            pass
        else:
            ledger.take(GRADIENTS, self.weight * elements)

    def _free_copy(self, elements: int) -> None:
        self.ledger.free(COPIES, self.compute * elements if self.casts else 0)

    # FSDP2

    def _gathered(self, group: str) -> int:
        """Return the bytes of a gathered group."""
        return self.compute * self.padded[group] if self.case.layout.is_sharded else 0

    def _gather(self, group: str) -> None:
        """Gather a group for the forward pass, and copy it out of the collective's buffer.

        FSDP2 keeps that buffer until the next group has been gathered, or the forward pass ends.
        """
        size = self._gathered(group)
        if not size:
            return
        buffer = self.ledger.take(BUCKETS, size if self.case.layout.shards > 1 else 0)
        self._stage(gloo.gathering(size, self.case.layout.shards))
        self._forget_buffer()
        self.ledger.take(BUCKETS, size)
        self.buffer = buffer

    def _forget_buffer(self) -> None:
        self.ledger.free(BUCKETS, self.buffer)
        self.buffer = 0

    def _release(self, group: str) -> None:
        self.ledger.free(BUCKETS, self._gathered(group))

    def _stage(self, size: int) -> None:
        """Count what gloo allocates on CPU ranks during a collective."""
        if self.case.device == "cpu":
            self.ledger.free(BUCKETS, self.ledger.take(BUCKETS, size))

    def _arrive(self, group: str) -> None:
        """Copy a group out of the buffer in which it arrived."""
        self.ledger.take(BUCKETS, self._gathered(group))

    def _reduce(self, group: str) -> None:
        """Free the gathered weights of a group and reduce its gradients to this rank's shard."""
        layout, ledger = self.case.layout, self.ledger
        if not layout.is_sharded or not self.sizes[group]:
            return
        ledger.free(BUCKETS, self._gathered(group) if group != "before" else 0)
        ledger.free(BUCKETS, self.reducing)
        self.reducing = ledger.take(BUCKETS, self.case.reduce_bytes * self.padded[group])
        self._stage(gloo.reduction_to_shards(self.reducing, layout.shards))
        ledger.free(BUCKETS, self.compute * self.sizes[group])
        shard = self.padded[group] // layout.shards
        if not self.case.accumulates and not self.case.offloads:
            ledger.take(GRADIENTS, self.weight * shard)

    def _update_bytes(self) -> int:
        """Return the temporary bytes of the optimizer: torch's foreach kernels need a copy of a state."""
        node = self.case.optimizer
        fused = node.get("fused") is True or node.get("foreach") is False
        if self.case.device == "cpu" or fused or not str(node.get("_target_", "")).startswith("torch.optim."):
            return 0
        return self.known.gradients


def _numel(parameter: Parameter) -> int:
    return math.prod(parameter.shape)
