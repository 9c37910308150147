"""Which modules FSDP2 shards as groups of their own, when a group is gathered, and when it is freed.

The layout is the one that torchtitan documents for its decoders. The embedding is a group, whose weights the backward
pass does not need. Each block is a group. The layers after the blocks (norm and head) are a group that is not freed
after the forward pass, and neither is the last block: the backward pass begins with them. While a group computes, the
next one is gathered; the first one while the root is.

Only a network that declares them, in its `outside_blocks()`, gets groups outside of its blocks: a group's weights are
there only while its modules are called, and a network may also read a weight directly. Undeclared layers, and those
that share a weight with another group (a tied head), stay with the root, which is gathered for the whole step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard_groups(module: nn.Module, blocks: Sequence[nn.Module], arguments: dict[str, Any]) -> list[Any]:
    """Shard the blocks and the declared layers outside of them, in place.

    Args:
        module: The whole module.
        blocks: Its blocks, in the order of the forward pass.
        arguments: Arguments of `fully_shard`.

    Returns:
        One module of each group, in the order of the forward pass.
    """
    before, after = _outside_blocks(module)
    whole = _Ties(module)
    keeps = {**arguments, "reshard_after_forward": False}
    groups: list[Any] = []
    if before and not whole.shares_parameters(before):
        groups.append(_grouped(before, arguments))
        if all(isinstance(one, nn.Embedding) for one in before):
            groups[-1].set_unshard_in_backward(False)
    own = [block for block in blocks if not whole.shares_parameters([block])]
    for block in own:
        groups.append(_grouped([block], keeps if block is own[-1] else arguments))
    if after and not whole.shares_parameters(after):
        groups.append(_grouped(after, keeps))
    return groups


def shard_networks(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Shard each submodule that has parameters as a root of its own, in place; those that share parameters are left.

    Args:
        module: The whole module, whose own `forward` is not used.
        arguments: Arguments of `fully_shard`.
    """
    whole = _Ties(module)
    parts = list(module.children())
    for part in parts:
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):  # they cannot be called
            parts += part.children()
        elif any(not isinstance(one, DTensor) for one in part.parameters()) and not whole.shares_parameters([part]):
            fully_shard(part, **arguments)


def prefetch_groups(root: Any, groups: list[Any], ahead: int) -> None:
    """Gather the next groups while one computes. FSDP2's own prefetch is limited by how fast the CPU issues it.

    Args:
        root: The root module, sharded, which is called first; None if it has not been sharded.
        groups: One module of each group, in the order of the forward pass.
        ahead: Number of groups to gather ahead.
    """
    if root is not None and groups and ahead:
        root.set_modules_to_forward_prefetch(groups[:ahead])
    for index, group in enumerate(groups):
        following, before = groups[index + 1 : index + 1 + ahead], groups[max(0, index - ahead) : index]
        if following:
            group.set_modules_to_forward_prefetch(following)
        if before:
            group.set_modules_to_backward_prefetch(before[::-1])


def _outside_blocks(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the layers before and after the blocks that the network declares."""
    for part in module.modules():
        declared = getattr(part, "outside_blocks", None)
        if callable(declared) and not isinstance(declared, nn.Module):
            before, after = declared()
            return list(before), list(after)
    return [], []


def _grouped(modules: list[nn.Module], arguments: dict[str, Any]) -> Any:
    """Shard modules as one group, and return one of them, which stands for the group."""
    fully_shard(modules if len(modules) > 1 else modules[0], **arguments)
    return modules[0]


class _Ties:
    """The uses of each parameter in the whole module, before anything is sharded."""

    def __init__(self, module: nn.Module) -> None:
        self._everywhere = _uses([module])

    def shares_parameters(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether a parameter of the modules is tied to one outside of them.

        FSDP2 requires all users of a parameter in one group: such modules are left to the root.
        """
        inside = _uses(modules)
        return any(self._everywhere[parameter] > count for parameter, count in inside.items())


def _uses(modules: Sequence[nn.Module]) -> Counter[int]:
    named = (module.named_parameters(remove_duplicate=False) for module in modules)
    return Counter(id(parameter) for parameters in named for _, parameter in parameters)
