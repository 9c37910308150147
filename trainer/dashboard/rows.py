"""What the table shows of a run: one row, as plain data."""

from __future__ import annotations

from typing import Any

from trainer.core.secrets import MASK, known
from trainer.runs.directory import RunDirectory
from trainer.runs.facts import flat_config, mapping
from trainer.runs.row import Row

_KEPT = (
    *("id", "name", "path", "state", "reason", "step", "max_steps", "epoch", "metrics", "best", "attempts", "tags"),
    *("world_size", "strategy", "cluster", "slurm_job_id", "created", "started", "ended", "energy_kwh", "cost"),
)
_MOST_KEYS = 2000
_LONGEST = 500


def table_row(row: Row) -> dict[str, Any]:
    """Return what the table shows of a run that can be read."""
    run, facts = RunDirectory(row.path), row.facts
    shown = {name: facts[name] for name in _KEPT}
    shown["checkpoints"] = sum(bool(one["committed"]) for one in facts["checkpoints"])
    shown["goodput"] = mapping(facts["ledger"]).get("goodput")
    beat = run.heartbeat(0) if row.is_active else None
    shown["rate"], shown["rate_unit"], shown["eta_s"] = (
        (beat.rate, beat.rate_unit, beat.eta_s) if beat else (None, None, None)
    )
    shown["config"] = _leaves(row.read_config())
    batch = shown["config"].get("data.batch_size")
    shown["batch_size"] = batch if type(batch) is int and batch > 0 else None
    masked: dict[str, Any] = _masked(shown, tuple(known()))
    return masked


def unreadable_row(run: RunDirectory, reason: str) -> dict[str, Any]:
    """Return the row of a run that cannot be read, which says why."""
    row = {"id": run.id, "name": run.name, "path": str(run.path), "state": "unreadable", "reason": reason}
    whole = {**row, "metrics": {}, "config": {}, "created": run.created_at()}
    masked: dict[str, Any] = _masked(whole, tuple(known()))
    return masked


def config_leaves(run: RunDirectory) -> dict[str, Any]:
    """Return the frozen values and the chosen groups by their dotted keys. The path of the run is the same in all."""
    return _leaves(flat_config(run, run.config(), run.manifest()))


def _masked(value: Any, secrets: tuple[str, ...]) -> Any:
    """As `core.secrets.mask_inside`, which looks the secrets up for each of some hundred texts of a row."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        return value
    if isinstance(value, dict):
        return {key: _masked(item, secrets) for key, item in value.items()}
    return [_masked(item, secrets) for item in value] if isinstance(value, list) else value


def _leaves(config: Any) -> dict[str, Any]:
    return {str(key): _short(value) for key, value in list(config.items())[:_MOST_KEYS] if key}


def _short(value: Any) -> Any:
    """Return a scalar as it is, and all else as text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value if not isinstance(value, int) or abs(value) < 2**53 else str(value)
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
