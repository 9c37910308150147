"""The section `logger`: user-defined loggers, name to `_target_`, as in Lightning and Hydra projects.

Lightning's WandbLogger would create a second W&B run. Its arguments are therefore moved to the section `tracking`, key
by key, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from trainer.config.namespaces import canonical
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.install import EXTRAS, pip_install

_MOVED = {"name": "run_name", "save_dir": "dir"}
"""Arguments of WandbLogger that have another name in `tracking`."""
_SAME = ("project", "entity", "group", "tags", "notes", "job_type", "mode", "dir")
_UNSET: tuple[Any, ...] = (None, "", [], False)
_HAS_NO_EFFECT = ("anonymous", "resume", "_target_", "_convert_")
_NEEDS = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "MLFlowLogger": ("mlflow",),
    "TrackioLogger": ("trackio",),
    "CometLogger": ("comet_ml",),
    "NeptuneLogger": ("neptune",),
}
"""Packages that loggers need: any one of them."""
_OURS = "trainer.tracking.trackio_logger.TrackioLogger"


def settle_loggers(config: dict[str, Any]) -> None:
    """Name a logger that has no name, and move the arguments of a WandbLogger to `tracking`.

    Raises:
        UserError: An argument has no equivalent in `tracking`.
    """
    section = config.get("logger") or {}
    if "_target_" in section:
        section = {str(section["_target_"]).rpartition(".")[2]: section}
    config["logger"] = {name: node for name, node in section.items() if not _is_wandb(node)}
    for name, node in section.items():
        if _is_wandb(node):
            _move(f"logger.{name}", node, config["tracking"])


def switched_off(config: dict[str, Any]) -> str | None:
    """Return a line for the user if there is a WandbLogger beside `tracking=none`, which takes precedence."""
    section = config.get("logger") or {}
    nodes = {"logger": section} if "_target_" in section else {f"logger.{name}": node for name, node in section.items()}
    off = next((name for name, node in nodes.items() if _is_wandb(node)), None)
    if off is None or config["tracking"]["name"] != "none":
        return None
    return f"{off}: no effect, because tracking.name=none switches W&B off; to log there: tracking=wandb"


def _is_wandb(node: Any) -> bool:
    return isinstance(node, dict) and _class_of(node) == "WandbLogger"


def _class_of(node: dict[str, Any]) -> str | None:
    """Return the class name of one of Lightning's own loggers or of ours, else None."""
    path = canonical(str(node.get("_target_")))
    return path.rpartition(".")[2] if path.startswith("lightning.pytorch.loggers.") or path == _OURS else None


def _move(where: str, node: dict[str, Any], tracking: dict[str, Any]) -> None:
    for name, value in node.items():
        if value in _UNSET or name in _HAS_NO_EFFECT:
            continue
        key = _MOVED.get(name, name)
        if name == "offline":
            key, value = "mode", "offline"
        if name not in (*_SAME, *_MOVED, "offline"):
            raise UserError(
                f"{where}.{name}={value}: not supported for the W&B run of this project",
                f"use {where}.{name}=null; its id is that of the run, the weights stay in the run's checkpoints, and "
                "self.logger.experiment is wandb's Run for everything else",
            )
        if tracking.get(key) is None or (key == "mode" and tracking[key] == "auto"):
            tracking[key] = value


def problems_of_loggers(config: dict[str, Any]) -> Iterator[TrainerError]:
    """Yield the loggers whose package is not installed. A job on SLURM has the same packages, unless in a container."""
    is_same = not config["cluster"].get("container")
    for name, node in (config.get("logger") or {}).items():
        packages = _NEEDS.get(_class_of(node) or "", ()) if isinstance(node, dict) else ()
        if is_same and packages and not any(find_spec(package) for package in packages):
            install = pip_install(packages[0]) if packages[0] in EXTRAS else f"pip install {packages[0]}"
            yield EnvironmentFault(
                f"logger.{name} needs the package {packages[0]}, which is not installed",
                f"{install}, or disable it with logger.{name}=null",
            )
