"""Hydra's own node, as a run keeps it in `.hydra/hydra.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def path_of(run_path: Path) -> Path:
    """Where it is, if the run has it: those made before do not."""
    return run_path / ".hydra" / "hydra.yaml"


def hydra_node(run_path: Path) -> dict[str, Any]:
    """What is inside `hydra:`; empty where the run has none."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = path_of(run_path).read_text(encoding="utf-8")
    except OSError:
        return {}
    found: dict[str, Any] = yaml.load(text, Loader=loader)["hydra"]
    return found


def env_set(run_path: Path) -> dict[str, str]:
    """`hydra.job.env_set`: variables for the environment of the ranks."""
    found = hydra_node(run_path).get("job", {}).get("env_set") or {}
    return {str(name): str(value) for name, value in found.items()}
