"""What the table shows of a run: one row, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.hydra_node import replaced
from trainer.core.errors import TrainerError
from trainer.core.secrets import mask_inside
from trainer.runs.directory import RunDirectory
from trainer.runs.facts import flat, mapping
from trainer.runs.state import ACTIVE
from trainer.runs.summary import summary

_KEPT = (
    *("id", "name", "path", "state", "reason", "step", "max_steps", "epoch", "metrics", "best", "attempts"),
    *("world_size", "strategy", "cluster", "slurm_job_id", "created", "started", "ended"),
)
_MOST_KEYS = 2000
_LONGEST = 500


def row_of(run: RunDirectory, slurm_states: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the row of a run; of one that cannot be read, a row that says so.

    Args:
        run: The run.
        slurm_states: As in `runs.state.state_of`.
    """
    try:
        facts = summary(run, slurm_states)
        row = {name: facts[name] for name in _KEPT}
        row["checkpoints"] = sum(bool(one["committed"]) for one in facts["checkpoints"])
        row["goodput"] = mapping(facts["ledger"]).get("goodput")
        row["wall_s"] = mapping(facts["ledger"]).get("wall_s")
        beat = run.heartbeat(0) if row["state"] in ACTIVE else None
        row["rate"], row["rate_unit"], row["eta_s"] = (
            (beat.rate, beat.rate_unit, beat.eta_s) if beat else (None, None, None)
        )
        config = run.config()
        row["config"] = config_leaves(run, config)
        batch = mapping(config.get("data")).get("batch_size")
        row["batch_size"] = batch if type(batch) is int and batch > 0 else None
    except Exception as error:  # whatever it is, the other runs are shown
        reason = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        row = {"id": run.id, "name": run.name, "path": str(run.path), "state": "unreadable", "reason": reason}
        row |= {"metrics": {}, "config": {}, "created": run.created_at()}
    masked: dict[str, Any] = mask_inside(row)
    return masked


def config_leaves(run: RunDirectory, config: dict[str, Any]) -> dict[str, Any]:
    """Return the frozen values and the chosen groups by their dotted keys. The path of the run is the same in all."""
    leaves = flat(replaced(config, str(run.path), "RUN_DIRECTORY"))
    choices = mapping(mapping(run.manifest()).get("choices"))
    found = {key: value for key, value in leaves.items() if key}
    found |= {str(group): option for group, option in choices.items() if str(group) not in leaves}
    return {key: _short(value) for key, value in list(found.items())[:_MOST_KEYS]}


def _short(value: Any) -> Any:
    """Return a scalar as it is, and all else as text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value if not isinstance(value, int) or abs(value) < 2**53 else str(value)
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
