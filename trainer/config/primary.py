"""A primary config of the user's own (`conf/config.yaml`, `--config-name train`) need not know the groups of ours.

What its defaults list leaves out is chosen as in the config that ships: `strategy: ddp`, `cluster: local` and so on.
Not `model` and `data`, which make the job.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from trainer.core.paths import conf_dir

_OF_THE_JOB = ("model", "data")
_SHIPPED = ("name", "runs_dir", "task", "optimizer", "scheduler", "strategy", "cluster", "checkpoint", "tracking")
"""Sections that every composition of the config that ships has."""
_NAMES = {
    "name": "${hydra:runtime.choices.model}-${hydra:runtime.choices.data}",
    "runs_dir": "${oc.env:TRAINER_RUNS_DIR,runs}",
}

Load = Callable[[Any, str, list[str]], Any]


def load_whole(loader: Any, config_name: str, groups: list[str], load: Load) -> Any:
    """`load(loader, config_name, groups)`, with our groups for those that the config does not have.

    Raises what `load` raises.
    """
    tree = _with_plus(loader, config_name, groups, load)
    keys = set(tree.keys())  # `in tree` would resolve each
    if keys.issuperset(_SHIPPED):
        return tree
    absent = [
        f"+{group}={option}"
        for group, option in _shipped_groups().items()
        if group not in keys and group not in tree.hydra.runtime.choices
    ]
    groups[:] = [*groups, *absent]
    tree = load(loader, config_name, groups) if absent else tree
    choices = tree.hydra.runtime.choices
    if choices.get("model") is None or choices.get("data") is None:
        tree.setdefault("name", config_name.rpartition("/")[2])
    if "task_name" in keys:  # the lightning-hydra-template's
        tree.setdefault("name", "${task_name}")
    for key, value in _NAMES.items():
        tree.setdefault(key, value)
    return tree


def _with_plus(loader: Any, config_name: str, groups: list[str], load: Load) -> Any:
    """Choosing a group of ours that the config does not have adds it: `optimizer=sgd` is `+optimizer=sgd` there."""
    from hydra.errors import ConfigCompositionException

    while True:
        try:
            return load(loader, config_name, groups)
        except ConfigCompositionException as error:
            absent = re.match(r"Could not override '([^'=@]+)'", str(error))
            at = [i for i, one in enumerate(groups) if absent and one.startswith(f"{absent[1]}=")]
            if absent is None or not at or absent[1] not in _shipped_groups():
                raise
            groups[at[0]] = f"+{groups[at[0]]}"


def _shipped_groups() -> dict[str, str]:
    """Groups to their options in the config that ships."""
    import yaml

    written = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = {group: option for one in written if isinstance(one, dict) for group, option in one.items()}
    return {group: option for group, option in chosen.items() if option is not None and group not in _OF_THE_JOB}
