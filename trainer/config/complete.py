"""Check the closed sections of a composed configuration, and complete it with defaults."""

from __future__ import annotations

from typing import Any

from trainer.config import hydra_errors, typed
from trainer.config.problems import raise_all
from trainer.config.schema import Config
from trainer.core.errors import TrainerError

_TEMPLATE_KEYS = frozenset(("ckpt_path", "train", "test", "task_name"))
"""Top-level keys of the lightning-hydra-template that `fit` reads."""
_DEFAULT_EPOCHS = 10


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Check the closed sections against the schema, and return the configuration with its defaults.

    Raises:
        UserError: All problems that were found.
    """
    problems: list[TrainerError] = []
    if isinstance(config.get("trainer"), dict):
        _limit(config["trainer"])
    if isinstance(config.get("trainer"), dict) and typed.is_lightnings(config["trainer"]):
        from trainer.config.lightning_keys import translate  # only for a job with such keys

        problems += translate(config)
    if not _TEMPLATE_KEYS.isdisjoint(config):
        from trainer.config.lightning_names import problems_at_top

        problems += problems_at_top(config)
    if not config.keys() <= set(typed.key_names(Config)):
        from trainer.config.own_keys import misspelt_keys  # only for a job with user-defined keys

        problems += misspelt_keys(config)
    problems += typed.top_level_problems(config)
    for section in typed.key_names(Config):
        if section in config and typed.is_closed(section):
            problems += typed.problems_of(section, config[section])
    raise_all(problems)
    unset = [name for name in typed.REQUIRED if config.get(name) is None]
    if unset:
        raise hydra_errors.missing(unset)
    _settle_interval(config)
    if str((config.get("optimizer") or {}).get("_target_")).startswith("torch.optim."):
        from trainer.config.schedule import settle_fused

        settle_fused(config)
    return typed.complete(config)


def _limit(options: dict[str, Any]) -> None:
    """Set the default number of epochs if nothing else limits the training, as Lightning does."""
    unlimited = (
        options.get("max_steps") in (None, -1),
        options.get("max_time") is None,
        not options.get("fast_dev_run"),
    )
    if all(unlimited) and options.get("max_epochs") is None:
        options["max_epochs"] = _DEFAULT_EPOCHS


def _settle_interval(config: dict[str, Any]) -> None:
    node = config.get("scheduler")
    if not isinstance(node, dict) or node.get("interval") is not None:
        return
    if str(node.get("_target_")).startswith("trainer.schedules."):
        node["interval"] = "step"  # as settle_interval would set it; spares most jobs the import
    else:
        from trainer.config.schedule import settle_interval

        settle_interval(config)
