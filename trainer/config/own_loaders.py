"""LightningModules with their own data loaders: they get `data=none` if no data was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.sources import Definition, Unknown, defines, find
from trainer.core.errors import UserError

NONE = "none"
DEFAULT = "digits"
_SIZES = ("data.batch_size", "data.micro_batch", "data.num_workers")
"""Keys that can be set without choosing data."""


def use_own_loaders(tree: Any, groups: list[str], values: list[str], cwd: Path) -> str | None:
    """Replace the default data by `data=none` if the model has its own loaders.

    Lightning prefers a data module to the loaders of the module, but the user did not choose the default data.

    Args:
        tree: The composed tree, which is changed.
        groups: Groups that were chosen on the command line.
        values: Keys that were set on the command line.
        cwd: Working directory.

    Returns:
        A line for the user if the data was replaced, else None.
    """
    from omegaconf import open_dict

    choices = tree.hydra.runtime.choices
    is_chosen = "data" in groups or any(key.startswith("data.") and key not in _SIZES for key in values)
    model = tree.get("model")
    if choices.get("data") != DEFAULT or is_chosen or not model or not isinstance(model.get("_target_"), str):
        return None
    if not has_train_loader(model["_target_"], cwd):
        return None
    kept = {key.partition(".")[2]: tree.data[key.partition(".")[2]] for key in values if key in _SIZES}
    with open_dict(tree):
        tree.data = {"_target_": None, **kept}
        choices["data"] = NONE
    return f"data: the loaders of {model['_target_']}, which has a train_dataloader; choose others with data=NAME"


def has_train_loader(target: str, cwd: Path) -> bool | None:
    """Return whether the class has a `train_dataloader` other than Lightning's; None if unknown."""
    result = find(target, cwd)
    if isinstance(result, Definition):
        return defines(result, "train_dataloader", but_not="lightning")
    return None if isinstance(result, Unknown) else False


def problems_of_loaders(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield an error for `data=none` with a model that has no loaders."""
    target = config["model"].get("_target_")
    if config["data"].get("_target_") is None and isinstance(target, str) and has_train_loader(target, cwd) is False:
        name = target.rpartition(".")[2]
        yield UserError(f"data=none: {name} has no train_dataloader of its own", "choose data: data=NAME")
