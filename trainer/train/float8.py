"""Linear layers that multiply in float8 while they train (`trainer.float8`), by torchao.

Weights, gradients, optimizer and checkpoints stay as they are: a layer scales and casts its inputs, its weight and the
gradient of its output for each of its three matrix products. `tensorwise` has one scale for a whole tensor, which is
the fastest; `rowwise` one for each row, which an outlier spoils less. Layers compute in the training's own precision
when the module is evaluated, and always in an evaluation, a prediction or an export, which do not convert them.

Converted are the linear layers in the model's repeated blocks (`strategies/blocks.py`) whose features are multiples of
16, as the kernels require: not the output layer, whose errors reach the loss at once. On CPU the products are emulated
in fp32 from operands in float8, for tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.core.install import pip_install
from trainer.strategies.blocks import blocks_of

_MULTIPLE = 16
"""Of which the dimensions of a float8 matrix product must be multiples (torch._scaled_mm)."""
_CAPABILITY = (8, 9)
"""CUDA compute capability with float8 tensor cores: Ada, Hopper and later."""


def convert(module: nn.Module, recipe: str, device: torch.device, block_class: str | None = None) -> int:
    """Convert the linear layers of a module in place; parameters keep their names and are the same objects.

    Args:
        module: The module, before a strategy wraps it.
        recipe: `trainer.float8`: tensorwise or rowwise; none: does nothing.
        device: Device of this rank.
        block_class: `strategy.blocks`.

    Returns:
        The number of converted layers.

    Raises:
        UserError: torchao is not installed, the GPU has no float8, or the model has no layer to convert.
    """
    if recipe == "none":
        return 0
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"trainer.float8={recipe}: {name} has no float8 tensor cores", "use trainer.float8=none")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        fix = f"{pip_install('torchao')}, or use trainer.float8=none"
        raise UserError(f"trainer.float8={recipe} needs the package torchao, which is not installed", fix) from None
    in_blocks = {id(part) for block in blocks_of(module, block_class) for part in block.modules()}
    chosen = {id(part) for part in module.modules() if id(part) in in_blocks and _is_suitable(part)}
    if not chosen:
        raise UserError(
            f"trainer.float8={recipe}: the model has no linear layers in repeated blocks with features that are "
            f"multiples of {_MULTIPLE}",
            "use trainer.float8=none, or name the class of the blocks: strategy.blocks=NAME",
        )
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", device.type != "cuda")  # a frozen dataclass; recipes have no argument for it
    modes = {name: part.training for name, part in module.named_modules()}
    convert_to_float8_training(module, module_filter_fn=lambda part, _: id(part) in chosen, config=config)
    plain, ours = _classes()
    for name, part in module.named_modules():
        if type(part) is plain:
            part.__class__ = ours
            part.training = modes[name]
    return len(chosen)


def _is_suitable(part: nn.Module) -> bool:
    if not isinstance(part, nn.Linear) or type(part).forward is not nn.Linear.forward:
        return False
    return part.in_features % _MULTIPLE == 0 and part.out_features % _MULTIPLE == 0


@cache
def _classes() -> tuple[type[nn.Linear], type[nn.Linear]]:
    """Return torchao's layer, and one that multiplies in float8 in training only."""
    from torchao.float8.float8_linear import Float8Linear

    class Float8InTraining(Float8Linear):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Any:
            if self.training:
                return super().forward(input)
            return nn.functional.linear(input, self.weight, self.bias)

    return Float8Linear, Float8InTraining
