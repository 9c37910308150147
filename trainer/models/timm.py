"""Any image model from timm, randomly initialized. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trainer.core.errors import UserError
from trainer.core.near import did_you_mean


def create(
    architecture: str, input_shape: Sequence[int], num_classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Create a timm model: `(batch, channels, height, width)` images to `(batch, num_classes)` logits.

    It is timm's own module, so that parameter names are timm's.

    Args:
        architecture: Name as in `timm.list_models()`.
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        options: More arguments of `timm.create_model`, such as `img_size`, which transformers need for non-default
            image sizes.

    Raises:
        UserError: timm cannot be imported, or has no such model.
    """
    try:
        import timm
    except ImportError as error:
        fix = "pip install timm, with a torchvision that matches the installed torch"
        raise UserError(f"model=timm cannot import the package timm: {error}", fix) from None
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models(), prefix="model.architecture=")
        fix = f"{hint}timm.list_models('*resnet*') lists those with resnet in their name"
        raise UserError(f"model.architecture={architecture}: timm has no such model", fix)
    model: nn.Module = timm.create_model(
        architecture, pretrained=False, in_chans=input_shape[0], num_classes=num_classes, **(options or {})
    )
    return model
