"""The facts about a run that `summary()` collects: their form, and where they are kept apart from the directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trainer.config.hydra_node import replaced
from trainer.runs.directory import RunDirectory
from trainer.runs.state import STATES

Facts = dict[str, Any]
"""The keys of `trainer show --json`."""

_NONE = type(None)
_FORMS: dict[str, tuple[type, ...]] = {
    "state": (str,),
    "reason": (str, _NONE),
    "step": (int, float, _NONE),
    "max_steps": (int, float, str, _NONE),
    "epoch": (int, float, _NONE),
    "metrics": (dict,),
    "best": (dict, _NONE),
    "attempts": (int,),
    "world_size": (int, _NONE),
    "strategy": (str, int, float, _NONE),
    "cluster": (str, int, float, _NONE),
    "slurm_job_id": (str, _NONE),
    "sweep": (str, _NONE),
    "checkpoints": (list,),
    "evaluations": (list,),
    "tags": (list,),
    "created": (int, float),
    "started": (int, float, _NONE),
    "ended": (int, float, _NONE),
    "ledger": (dict, _NONE),
    "energy_kwh": (int, float, _NONE),
    "cost": (int, float, _NONE),
    "bill": (dict,),
    **dict.fromkeys(("wandb_id", "wandb", "tracking", "stragglers"), (object,)),
}
"""Every key of `summary()` but those of the path, with the types that readers rely on. What is kept without one of them
is not used."""

_PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "best": {"metric": (str, _NONE), "value": (int, float), "step": (int, float)},
    "checkpoints": {"step": (int,), "path": (str,), "bytes": (int, _NONE), "committed": (bool,)},
    "evaluations": {"step": (int,), "split": (str,), "metrics": (dict,)},
}
"""The same of the mappings, or the lists of mappings, under these keys."""


def is_well_formed(facts: Mapping[str, Any]) -> bool:
    """Return whether facts from a file have the keys and types that this version relies on."""
    if facts.get("state") not in STATES:
        return False
    if not all(name in facts and isinstance(facts[name], kinds) for name, kinds in _FORMS.items()):
        return False
    return all(_is_part(one, kinds) for name, kinds in _PARTS.items() for one in _parts_of(facts[name]))


def _parts_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_part(part: Any, kinds: Mapping[str, tuple[type, ...]]) -> bool:
    return isinstance(part, dict) and all(name in part and isinstance(part[name], kinds[name]) for name in kinds)


def with_relative_paths(facts: Facts, run: RunDirectory) -> Facts:
    """Return the facts without what belongs to this node or follows from the path of the run directory."""
    prefix = f"{run.path}{os.sep}"
    shared = [{**one, "path": one["path"].removeprefix(prefix)} for one in facts["checkpoints"] if not one.get("local")]
    left_out = ("id", "name", "path")
    return {**{name: value for name, value in facts.items() if name not in left_out}, "checkpoints": shared}


def with_absolute_paths(facts: Facts, folder: str) -> Facts:
    """Return the facts of the run directory `folder`, completed; node-local checkpoints are not added."""
    name, _, identity = os.path.basename(folder).rpartition("-")
    checkpoints = [{**one, "path": f"{folder}{os.sep}{one['path']}"} for one in facts["checkpoints"]]
    return {"id": identity, "name": name, "path": folder, **facts, "checkpoints": checkpoints}


def flat(value: Any, key: str = "") -> Facts:
    """Return the leaves of nested mappings by their dotted keys. An empty mapping is a leaf, as are lists.

    Leaves are what JSON can hold: a date of YAML becomes text.
    """
    if not isinstance(value, dict) or not value:
        return {key: _leaf(value)}
    leaves: Facts = {}
    for name, inner in value.items():
        leaves.update(flat(inner, f"{key}.{name}" if key else str(name)))
    return leaves


def _leaf(value: Any) -> Any:
    if isinstance(value, list):
        return [_leaf(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _leaf(item) for name, item in value.items()}
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def mapping(value: Any) -> dict[str, Any]:
    """Return a value of a manifest if it is a mapping, else an empty one: the file may be of any origin."""
    return value if isinstance(value, dict) else {}


def flat_config(run: RunDirectory, config: Facts, manifest: Facts) -> Facts:
    """Return the chosen groups and the frozen values. The path of the run is the same text in all runs."""
    values = replaced(config, str(run.path), "RUN_DIRECTORY")
    choices = {str(group): option for group, option in mapping(manifest.get("choices")).items()}
    leaves = {key: value for key, value in flat(values).items() if key}
    return {**{group: option for group, option in choices.items() if group not in leaves}, **leaves}
