"""Activation checkpointing and compilation of a model's blocks, before the strategy wraps them.

The order is fixed: activation checkpointing inside, then compile, then the strategy's wrapper outside. Compiling around
FSDP's hooks breaks the graph at each of them. Checkpointing around FSDP would gather the parameters once more.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.config.strategy import CUDA_GRAPHS, Single
from trainer.core.errors import UserError
from trainer.models.linear_cross_entropy import LossHead
from trainer.runtime.compile_cache import use_compile_cache

_KERNELS = re.compile(
    r"aten::_(scaled_dot_product_\w*attention\w*|(flash|efficient|cudnn)_attention_forward\w*)"
    r"|torch_attn::_varlen_attn\w*"
)
"""Names of the operators that compute attention: those that `scaled_dot_product_attention` may choose, and varlen."""


def attention_kernels() -> set[Any]:
    """Return the operators of this torch that compute attention in the forward pass, flex attention included.

    The list comes from torch's registry, because which kernel runs depends on the GPU, the dtype and the release: on
    Hopper it is cuDNN's. The fallback of plain operators consists of matrix products.
    """
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    kernels: set[Any] = {torch.ops.higher_order.flex_attention}
    for name in names:
        if _KERNELS.fullmatch(name) and "backward" not in name:
            namespace, _, operator = name.partition("::")
            packet = getattr(getattr(torch.ops, namespace), operator)
            kernels |= {getattr(packet, overload) for overload in packet.overloads()}
    return kernels


@functools.cache
def _saved_operators() -> frozenset[Any]:
    """Return the operators that `selective` does not recompute.

    Matrix products and attention take most of the time, but not most of the memory.
    """
    import torch.nn.attention.flex_attention
    import torch.nn.attention.varlen  # both register their operators

    aten = torch.ops.aten
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default}
    return frozenset(products | attention_kernels())


def blocks_of(module: nn.Module, class_name: str | None = None) -> list[nn.Module]:
    """Return the submodules that are sharded, checkpointed and compiled one by one.

    These are the modules of the class `class_name` if given; else the result of the network's own `blocks()`; else the
    members of every ModuleList or Sequential that repeats a class with parameters; else none.

    Raises:
        UserError: No module has the class `class_name`.
    """
    if class_name is not None:
        blocks = [part for part in module.modules() if type(part).__name__ == class_name]
        if not blocks:
            raise UserError(
                f"strategy.blocks={class_name}: the model has no module of that class.",
                f"Its classes: {', '.join(sorted({type(part).__name__ for part in module.modules()}))}.",
            )
        return blocks
    for part in module.modules():
        own = getattr(part, "blocks", None)
        if callable(own) and not isinstance(own, nn.Module):
            return list(own())
    repeated: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and not any(part in list(r.modules()) for r in repeated):
            classes = Counter(type(child) for child in part if any(True for _ in child.parameters()))
            repeated += [child for child in part if classes[type(child)] > 1]
    return repeated


def prepare(module: nn.Module, options: Single, class_name: str | None = None) -> list[nn.Module]:
    """Apply activation checkpointing and compilation to the blocks, in place, and return the blocks."""
    blocks = blocks_of(module, class_name)
    for block in blocks:
        if options.activation_checkpointing not in ("none", "auto"):
            block.forward = _checkpointed(block.forward, options.activation_checkpointing)
    if options.compile:
        _compile(module, blocks, options)
    return blocks


def _compile(module: nn.Module, blocks: list[nn.Module], options: Single) -> None:
    """Compile the blocks, and the loss of a language model. What was compiled before comes from a cache."""
    use_compile_cache()
    sizes: dict[str, Any] = {"fullgraph": options.compile_fullgraph, "dynamic": options.compile_dynamic}
    mode = None if options.compile_mode == "default" else options.compile_mode
    for block in blocks:
        block.compile(mode=mode, **sizes)
    # The loss of a chunk runs several times in a pass: a CUDA graph would overwrite the results of the chunk before.
    own_mode = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}.get(str(mode), mode)
    for part in module.modules():
        if isinstance(part, LossHead):
            part.compile_loss(mode=own_mode, **sizes)
    if options.compile_mode in CUDA_GRAPHS:
        # Else a graph takes each block of an evaluation for a new pass, which may overwrite the block before.
        for network in (part for part in module.children() if any(one is blocks[0] for one in part.modules())):
            network.register_forward_pre_hook(_mark_step)


def _mark_step(*_: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _checkpointed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Return `forward` with activation checkpointing. Unlike a wrapper module it leaves parameter names unchanged."""
    context: dict[str, Any] = {}
    if kind == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    @functools.wraps(forward)
    def checkpointed(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **context, **named)

    return checkpointed


def _policy(_: Any, operator: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _saved_operators() else CheckpointPolicy.PREFER_RECOMPUTE
