"""Read Hydra's own node from the `.hydra/hydra.yaml` of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def path_of(run_path: Path) -> Path:
    """Return the path of the file, which older runs do not have."""
    return run_path / ".hydra" / "hydra.yaml"


def hydra_node(run_path: Path) -> dict[str, Any]:
    """Return the content of `hydra:`; empty if the run has no such file."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = path_of(run_path).read_text(encoding="utf-8")
    except OSError:
        return {}
    node: dict[str, Any] = yaml.load(text, Loader=loader)["hydra"]
    return node


def env_set(run_path: Path) -> dict[str, str]:
    """Return `hydra.job.env_set`: environment variables of the ranks."""
    variables = hydra_node(run_path).get("job", {}).get("env_set") or {}
    return {str(name): str(value) for name, value in variables.items()}
