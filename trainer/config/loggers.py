"""The section `logger`: the user's own loggers, name to `_target_`, as in Lightning and Hydra projects.

Lightning's WandbLogger is not one of them: its run would be a second one beside the run's own. What its node says is
moved into the section `tracking`, key by key, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from trainer.config.namespaces import canonical
from trainer.core.errors import EnvironmentFault, TrainerError, UserError

_MOVED = {"name": "run_name", "save_dir": "dir"}
"""Arguments of WandbLogger that have another name in `tracking`."""
_SAME = ("project", "entity", "group", "tags", "notes", "job_type", "mode", "dir")
_NOTHING_SAID: tuple[Any, ...] = (None, "", [], False)
_HAS_NO_EFFECT = ("anonymous", "resume", "_target_", "_convert_")
_NEEDS = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "MLFlowLogger": ("mlflow", "mlflow_skinny"),
    "CometLogger": ("comet_ml",),
    "NeptuneLogger": ("neptune",),
}
"""Lightning's loggers by the packages that they need: any one of them."""


def settle_loggers(config: dict[str, Any]) -> None:
    """Give a lone logger a name, and move a WandbLogger into `tracking`. Raises UserError for what cannot be moved."""
    section = config.get("logger") or {}
    if "_target_" in section:
        section = {str(section["_target_"]).rpartition(".")[2]: section}
    config["logger"] = {name: node for name, node in section.items() if not _is_wandb(node)}
    for name, node in section.items():
        if _is_wandb(node):
            _move(f"logger.{name}", node, config["tracking"])


def _is_wandb(node: Any) -> bool:
    return isinstance(node, dict) and _class_of(node) == "WandbLogger"


def _class_of(node: dict[str, Any]) -> str | None:
    """The name of the class, of one of Lightning's own loggers."""
    path = canonical(str(node.get("_target_")))
    return path.rpartition(".")[2] if path.startswith("lightning.pytorch.loggers.") else None


def _move(where: str, node: dict[str, Any], tracking: dict[str, Any]) -> None:
    for name, value in node.items():
        if value in _NOTHING_SAID or name in _HAS_NO_EFFECT:
            continue
        key = _MOVED.get(name, name)
        if name == "offline":
            key, value = "mode", "offline"
        if name not in (*_SAME, *_MOVED, "offline"):
            raise UserError(
                f"{where}.{name}={value}: the W&B run of this project cannot be given this",
                f"use {where}.{name}=null; its id is the run's own, the weights stay in the run's checkpoints, and "
                "self.logger.experiment is wandb's Run, for all else",
            )
        if tracking.get(key) is None or (key == "mode" and tracking[key] == "auto"):
            tracking[key] = value


def problems_of_loggers(config: dict[str, Any]) -> Iterator[TrainerError]:
    """Loggers that need a package that is not here."""
    here = config["cluster"]["name"] == "local"
    for name, node in (config.get("logger") or {}).items():
        packages = _NEEDS.get(_class_of(node) or "", ()) if isinstance(node, dict) else ()
        if here and packages and not any(find_spec(package) for package in packages):
            yield EnvironmentFault(
                f"logger.{name} needs the package {packages[0]}, which is not installed",
                f"pip install {packages[0]}, or leave it out with logger.{name}=null",
            )
