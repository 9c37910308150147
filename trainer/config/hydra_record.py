"""Read Hydra's own node from the `.hydra/hydra.yaml` of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config import yaml_limits
from trainer.core.errors import UserError


def path_of(run_path: Path) -> Path:
    """Return the path of the file, which older runs do not have."""
    return run_path / ".hydra" / "hydra.yaml"


def hydra_node(run_path: Path) -> dict[str, Any]:
    """Return the content of `hydra:`; empty if the run has no such file."""
    path = path_of(run_path)
    if not path.exists():
        return {}
    import yaml

    try:
        node: dict[str, Any] = yaml_limits.load(path)["hydra"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        fix = "restore it from a backup: it is written once, and nothing writes it again"
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}", fix) from None
    return node


def env_set(run_path: Path) -> dict[str, str]:
    """Return `hydra.job.env_set`: environment variables of the ranks."""
    variables = hydra_node(run_path).get("job", {}).get("env_set") or {}
    return {str(name): str(value) for name, value in variables.items()}
