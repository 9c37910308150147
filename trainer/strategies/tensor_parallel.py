"""Tensor parallel layers through DTensor. A network declares them in its `tensor_parallel()`:

    def tensor_parallel(self) -> dict[str, str]:
        return {"body.*.attention.query": "column", ..., "body.*.attention.out": "row"}

Patterns are of module names inside the network (`*` stands for one part). A `column` layer gives each rank a part
of its outputs, which the network must not assume to be whole in between; a `row` layer takes such parts and sums.
"""

from __future__ import annotations

import fnmatch

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainer.core.errors import UserError

STYLES = {"column": ColwiseParallel, "row": RowwiseParallel}


def parallelize(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the declared layers over `mesh`, in place; nothing if it has one rank.

    Raises UserError if the network declares none, or a layer does not divide.
    """
    size = mesh.size()
    if size == 1:
        return
    network = next((part for part in module.modules() if callable(getattr(part, "tensor_parallel", None))), None)
    if network is None:
        raise UserError(
            f"strategy=tp: {type(module).__name__} does not say which layers to split.",
            "Give the network a method tensor_parallel() (docs/strategies.md), or use strategy=fsdp.",
        )
    declared: dict[str, str] = network.tensor_parallel()  # type: ignore[operator]
    plan = {}
    for name, part in network.named_modules():
        style = next((style for pattern, style in declared.items() if _matches(name, pattern)), None)
        if style is None:
            continue
        assert isinstance(part, nn.Linear), f"{name} is declared {style}-wise but is no nn.Linear"
        divided = part.out_features if style == "column" else part.in_features
        if divided % size:
            raise UserError(
                f"strategy.tensor_parallel_size={size} does not divide the {divided} features of {name}.",
                "Choose a divisor.",
            )
        shared = _other_user(network, name)
        if shared is not None:
            raise UserError(
                f"strategy=tp: {name} is declared {style}-wise, but {shared} uses its weight, too.",
                "Leave tied layers out of tensor_parallel().",
            )
        plan[name] = STYLES[style]()
    parallelize_module(network, mesh, plan)


def _other_user(network: nn.Module, name: str) -> str | None:
    """A module outside `name` that has one of its parameters; splitting would untie them."""
    own = {id(parameter) for parameter in network.get_submodule(name).parameters()}
    for other, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(f"{name}."):
            return other
    return None


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
