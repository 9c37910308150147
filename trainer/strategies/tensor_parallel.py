"""Tensor parallelism with DTensor, for the layers that a network declares in its `tensor_parallel()`.

    def tensor_parallel(self) -> dict[str, str]:
        return {"body.*.attention.query": "column", ..., "body.*.attention.out": "row"}

The keys are patterns of module names inside the network; `*` matches one part of a name. A `column` layer splits its
output features over the ranks: code between the layers must not assume the full number of features. A `row` layer takes
split inputs and sums the results over the ranks.

With `strategy.loss_parallel` a `vocabulary` layer, a LossHead that shares its weight with no other layer, is split by
rows (`strategies/loss_parallel.py`). Otherwise it stays whole.

With `strategy.sequence_parallel` the features between a `row` layer and the next `column` layers are split over the
ranks by positions (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198): norms, dropout and the residual stream
take 1/n of the memory and time. The sum after a `row` layer becomes a reduce-scatter and an all-gather, which move as
many bytes. The network declares where, in its `sequence_parallel()`:

    def sequence_parallel(self) -> dict[str, str]:
        return {"embedding": "split", "body.*.norm": "norm", "body.*.attention": "join", "norm": "norm_join"}

The output of a `split` module is split. A `norm` works on a part of the sequence. A `join` module, which holds `column`
layers, gets its first input whole, as a DTensor. The output of a `norm_join` is made whole: it precedes the head.
"""

from __future__ import annotations

import fnmatch

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trainer.core.errors import UserError
from trainer.models.linear_cross_entropy import LossHead
from trainer.strategies.loss_parallel import split_vocabulary

_SEQUENCE = 1
"""Dimension of the positions in features of shape `(batch, length, dim)`."""


def parallelize(module: nn.Module, mesh: DeviceMesh, sequence: bool = False, loss: bool = False) -> None:
    """Split the declared layers over `mesh`, in place. Does nothing if the mesh has one rank.

    Args:
        module: The module to train.
        mesh: The ranks that share each layer.
        sequence: `strategy.sequence_parallel`.
        loss: `strategy.loss_parallel`.

    Raises:
        UserError: The network declares no layers, a layer's features are not divisible by the number of ranks, or
            another module uses the layer's weight.
    """
    size = mesh.size()
    if size == 1:
        return
    network = next((part for part in module.modules() if callable(getattr(part, "tensor_parallel", None))), None)
    if network is None:
        raise UserError(
            f"strategy=tp: {type(module).__name__} does not declare which layers to split.",
            "Add a method tensor_parallel() to the network (docs/strategies.md), or use strategy=fsdp.",
        )
    declared: dict[str, str] = network.tensor_parallel()  # type: ignore[operator]
    plan: dict[str, ParallelStyle] = {}
    heads: list[nn.Module] = []
    for name, part in network.named_modules():
        style = next((style for pattern, style in declared.items() if _matches(name, pattern)), None)
        if style is None or (style == "vocabulary" and not loss):
            continue
        assert isinstance(part, nn.Linear), f"{name} is declared {style}-wise but is not an nn.Linear"
        features = part.in_features if style == "row" else part.out_features
        if features % size:
            raise UserError(
                f"strategy.tensor_parallel_size={size} does not divide the {features} features of {name}.",
                "Choose a divisor.",
            )
        other = _other_user(network, name)
        if other is not None:
            raise UserError(
                f"strategy=tp: {name} is declared {style}-wise, but {other} uses its weight, too.",
                "Leave tied layers out of tensor_parallel().",
            )
        if style == "vocabulary":
            heads.append(part)
        elif style == "column":
            plan[name] = ColwiseParallel()
        else:
            plan[name] = RowwiseParallel(output_layouts=Shard(_SEQUENCE)) if sequence else RowwiseParallel()
    if sequence:
        _split_sequence(network, mesh, plan)
    parallelize_module(network, mesh, plan)
    if loss:
        _split_heads(network, heads, mesh)


def _split_heads(network: nn.Module, heads: list[nn.Module], mesh: DeviceMesh) -> None:
    if not heads or not all(isinstance(head, LossHead) for head in heads):
        raise UserError(
            f"strategy.loss_parallel=true: {type(network).__name__} has no output layer that can be split.",
            "With model=transformer set model.tied=false (docs/strategies.md), or use strategy.loss_parallel=false.",
        )
    for head in heads:
        assert isinstance(head, LossHead)
        split_vocabulary(head, mesh)


def _split_sequence(network: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    """Add the norms to the `plan`, and hooks to the modules at which the sequence is split and joined."""
    if not callable(getattr(network, "sequence_parallel", None)):
        raise UserError(
            f"strategy.sequence_parallel=true: {type(network).__name__} does not declare where to split the sequence.",
            "Add a method sequence_parallel() to the network (docs/strategies.md), or use sequence_parallel=false.",
        )
    declared: dict[str, str] = network.sequence_parallel()  # type: ignore[operator]
    for name, part in network.named_modules():
        role = next((role for pattern, role in declared.items() if _matches(name, pattern)), None)
        if role in ("norm", "norm_join"):
            plan[name] = SequenceParallel(sequence_dim=_SEQUENCE, use_local_output=role == "norm")
        if role == "norm_join":
            part.register_forward_hook(lambda part, inputs, output: _joined(output, mesh).to_local(), prepend=False)
        elif role == "join":
            part.register_forward_pre_hook(lambda part, inputs: (_joined(inputs[0], mesh), *inputs[1:]))
        elif role == "split":
            part.register_forward_hook(lambda part, inputs, output: _split(output, mesh))


def _split(features: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's positions of features that all ranks have. Its gradient is gathered from all ranks."""
    length = features.shape[_SEQUENCE]
    if length % mesh.size():
        raise UserError(
            f"strategy.sequence_parallel=true: a sequence of {length} is not divisible by {mesh.size()} ranks.",
            "Use a sequence length that is, or strategy.sequence_parallel=false.",
        )
    whole = DTensor.from_local(features, mesh, [Replicate()], run_check=False)
    part: Tensor = whole.redistribute(placements=[Shard(_SEQUENCE)]).to_local()
    return part


def _joined(features: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return the features of all positions. What the ranks add to its gradient is summed where it is split again."""
    if not isinstance(features, DTensor):
        features = DTensor.from_local(features, mesh, [Shard(_SEQUENCE)], run_check=False)
    return features.redistribute(placements=[Replicate()])


def _other_user(network: nn.Module, name: str) -> str | None:
    """Return the name of a parameter outside the layer `name` that is tied to it; splitting would untie them."""
    own = {id(parameter) for parameter in network.get_submodule(name).parameters()}
    for other, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(f"{name}."):
            return other
    return None


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
