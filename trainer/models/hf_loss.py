"""The loss of a language model of `transformers` without the logits of all positions in memory.

Its forward pass computes everything up to the output layer and what follows it. The output layer is given the targets
before, computes the losses in chunks (`linear_cross_entropy.py`), and passes the features on in place of the logits,
which nobody reads. What follows must be known: it is recorded from a forward pass without values, and may scale the
logits (Cohere, Granite) and cap them with a tanh (Gemma).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.models.linear_cross_entropy import Chunk, Losses, LossHead, chunk_of_loss

_PROBED_TOKENS = 2


class Adjustment(NamedTuple):
    """What becomes of the logits x of the output layer: `scale * x`, or `cap * tanh(scale * x)`."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the adjusted logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits) * self.cap

    def chunk(self) -> Chunk:
        """Return the function that computes the loss of a chunk and its gradient by the logits before they change."""
        if self == Adjustment():
            return chunk_of_loss

        def chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            adjusted = self(logits.to(torch.promote_types(logits.dtype, torch.float32)))
            total, gradient = chunk_of_loss(adjusted, targets)
            if self.cap is not None:
                gradient = gradient * (self.cap - adjusted.square() / self.cap)
            return total, (gradient * self.scale).to(logits.dtype)

        return chunk


class OutputLayer(LossHead):
    """The output layer of a network that knows only of logits."""

    adjustment: Adjustment
    targets: Tensor | None
    losses: Losses | None

    @staticmethod
    def take_the_place_of(layer: nn.Linear, adjustment: Adjustment) -> None:
        """Turn a linear layer into one, in place: its parameters may be tied, deferred, or watched by hooks."""
        layer.__class__ = OutputLayer
        assert isinstance(layer, OutputLayer)
        layer.adjustment, layer.chunk = adjustment, adjustment.chunk()
        layer.targets = layer.losses = None

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits as the network returns them."""
        return self.adjustment(super().logits(features))

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """Return the logits before what follows; with `targets` set, keep the losses and return the features."""
        if self.targets is None:
            return super().logits(features)
        losses = super().forward(features, self.targets)
        assert isinstance(losses, Losses)
        self.losses = losses
        return features


def losses_inside(network: Any, named: dict[str, Tensor], head: OutputLayer, targets: Tensor) -> Losses:
    """Return the losses that the output layer computes while the network is called.

    Args:
        network: The language model.
        named: Its inputs.
        head: Its output layer.
        targets: Token ids of shape `(batch, length)`.
    """
    head.targets = targets
    try:
        network(**named)
        assert head.losses is not None, f"{type(network).__name__} did not call its output layer"
        return head.losses
    finally:
        head.targets = head.losses = None


def adjustment_of(network: Any, input_name: str) -> Adjustment | str:
    """Return what the network makes of the logits of its output layer, or why it is not known.

    Args:
        network: A language model whose forward pass takes token ids; nothing is computed.
        input_name: The name of their argument.
    """
    head = network.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its output layer is {'missing' if head is None else f'of class {type(head).__name__}'}"
    if network.base_model is network:
        return "it has no network of its own below the output layer"
    record = _AfterTheHead()
    hook = head.register_forward_hook(lambda layer, inputs, output: record.begin(output))
    try:
        with torch.no_grad(), _no_values(head.weight), _without(network.base_model, head), record:
            tokens = torch.zeros(1, _PROBED_TOKENS, dtype=torch.long, device=head.weight.device)
            logits = network(**{input_name: tokens}).logits
    except Exception as error:  # any code of the library
        first = next(iter(str(error).splitlines()), "")[:120]
        return f"its forward pass without values fails ({type(error).__name__}: {first})"
    finally:
        hook.remove()
    if record.calls != 1:
        return f"its output layer is called {record.calls} times"
    if tuple(logits.shape) != (1, _PROBED_TOKENS, head.out_features):
        return "it changes the shape of the logits"
    return record.adjustments.get(id(logits)) or "it changes the logits in another way than by a factor and a tanh"


def _no_values(weight: Tensor) -> FakeTensorMode:
    """Return the mode in which nothing is computed; that of the weight if it has no values either (`trainer plan`)."""
    own = weight.fake_mode if isinstance(weight, FakeTensor) else None
    return own or FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _without(base: Any, head: nn.Linear) -> Generator[None, None, None]:
    """Let the network below the output layer return features without computing: experts need values to choose."""
    from transformers.modeling_outputs import BaseModelOutput

    class OnlyFeatures(BaseModelOutput):  # type: ignore[misc]
        def __getattr__(self, name: str) -> None:
            """Return None for whatever else such a network returns."""

    def forward(*_: Any, **__: Any) -> Any:
        weight = head.weight
        features = torch.empty(1, _PROBED_TOKENS, head.in_features, dtype=weight.dtype, device=weight.device)
        return OnlyFeatures(last_hidden_state=features)

    before = base.__dict__.get("forward")
    base.forward = forward
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


class _AfterTheHead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is done with the output of the head: to each tensor made of it, the adjustment that it is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.adjustments: dict[int, Adjustment] = {}
        self.calls = 0
        self._alive: list[Tensor] = []  # an id is that of one tensor only while it lives
        self._storages: set[int] = set()

    def begin(self, logits: Tensor) -> None:
        """Follow the output of the head."""
        self.calls += 1
        self._keep(logits, Adjustment())

    def _keep(self, tensor: Tensor, adjustment: Adjustment) -> None:
        self._alive.append(tensor)
        self._storages.add(tensor.untyped_storage()._cdata)
        self.adjustments[id(tensor)] = adjustment

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        if not isinstance(first, Tensor) or first.untyped_storage()._cdata not in self._storages:
            return result
        before = self.adjustments.get(id(first))
        if func._schema.is_mutable:  # as of some columns: what the others hold is not followed
            self.adjustments.clear()
        elif before is not None and isinstance(result, Tensor) and result.shape == first.shape:
            after = _applied(before, func, args[1] if len(args) > 1 else None)
            if after is not None:
                self._keep(result, after)
        return result


def _applied(before: Adjustment, func: Any, factor: Any) -> Adjustment | None:
    """Return the adjustment after an operator; None if it is not one."""
    name = func._schema.name.partition("::")[2]
    if name in ("_to_copy", "clone", "alias", "detach", "slice"):
        return before
    if name == "tanh" and before.cap is None:
        return Adjustment(before.scale, 1.0)
    if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor) and isinstance(factor, (int, float)) and factor:
        times = float(factor) if name == "mul" else 1.0 / factor
        if before.cap is None:
            return Adjustment(before.scale * times)
        return Adjustment(before.scale, before.cap * times)
    return None
