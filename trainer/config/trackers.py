"""The group `tracking`: its options for trackers other than W&B become entries of the section `logger`.

`tracking=tensorboard` and `tracking=[wandb,mlflow]` choose files that name their loggers under `loggers`. These are
moved to `logger` before values are set, so that each logger has one place, whichever group it was chosen from, and its
arguments are checked like those of any other target.
"""

from __future__ import annotations

from typing import Any

from trainer.core.errors import UserError

KEY = "loggers"
_OF_WANDB = ("mode", "project", "entity", "group", "run_name", "tags", "notes", "job_type", "dir")


def move_to_logger(tree: Any) -> None:
    """Move `tracking.loggers` of a composed tree to `logger`, and switch W&B off unless a chosen file names it.

    A logger that the section `logger` has under the same name takes precedence, argument by argument.

    Raises:
        UserError: A file of the group has a `_target_` in addition to other trackers.
    """
    from omegaconf import DictConfig, OmegaConf

    tracking = tree.get("tracking")
    if not isinstance(tracking, DictConfig):
        return
    if tracking.get("_target_"):
        _name_target(tree, tracking)
        tracking = tree.tracking
    loggers = tracking.get(KEY)
    if not isinstance(loggers, DictConfig):
        return
    del tracking[KEY]
    if tracking.get("name") is None:
        tracking["name"] = "none"
    own = tree.get("logger")
    tree["logger"] = OmegaConf.merge(loggers, own) if isinstance(own, DictConfig) else loggers


def _name_target(tree: Any, tracking: Any) -> None:
    """Give a logger that is the whole section `tracking` the name of its class."""
    target = str(tracking["_target_"])
    name = target.rpartition(".")[2]
    if tracking.get("name") in ("wandb", "none") or tracking.get(KEY):
        raise UserError(
            f"tracking._target_={target} beside another tracker",
            f"write it in that file as\n    loggers:\n      {name}:\n        _target_: {target}",
        )
    tree["tracking"] = {KEY: {name: tracking}}


def note_on_wandb(tree: Any, keys: list[str]) -> str | None:
    """Return a line on options of W&B that were typed for a job without it, else None."""
    tracking = tree.get("tracking")
    if not tracking or tracking.get("name") != "none" or not tree.get("logger"):
        return None
    unused = [key for key in keys if key.startswith("tracking.") and key.partition(".")[2] in _OF_WANDB]
    if not unused:
        return None
    loggers = [str(name) for name, node in tree.logger.items() if node]
    return (
        f"{', '.join(unused)}: no effect without W&B; to log there as well: tracking=[{','.join(['wandb', *loggers])}]"
    )
