"""Tensor parallelism with DTensor, for the layers that a network declares in its `tensor_parallel()`.

    def tensor_parallel(self) -> dict[str, str]:
        return {"body.*.attention.query": "column", ..., "body.*.attention.out": "row"}

The keys are patterns of module names inside the network; `*` matches one part of a name. A `column` layer splits its
output features over the ranks: code between the layers must not assume the full number of features. A `row` layer takes
split inputs and sums the results over the ranks.
"""

from __future__ import annotations

import fnmatch

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainer.core.errors import UserError

STYLES = {"column": ColwiseParallel, "row": RowwiseParallel}


def parallelize(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the declared layers over `mesh`, in place. Does nothing if the mesh has one rank.

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
    plan = {}
    for name, part in network.named_modules():
        style = next((style for pattern, style in declared.items() if _matches(name, pattern)), None)
        if style is None:
            continue
        assert isinstance(part, nn.Linear), f"{name} is declared {style}-wise but is not an nn.Linear"
        features = part.out_features if style == "column" else part.in_features
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
        plan[name] = STYLES[style]()
    parallelize_module(network, mesh, plan)


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
