"""Where the configs and the SLURM templates that ship with this package are."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    """A wheel holds the folder inside the package; a checkout has it beside the package."""
    inside = _PACKAGE / in_wheel
    return inside if inside.is_dir() else _PACKAGE.parent / in_checkout


def conf_dir() -> Path:
    """The Hydra groups that ship with the package."""
    return _shipped("_conf", "conf")


def slurm_dir() -> Path:
    """The SLURM job script template."""
    return _shipped("_slurm", "slurm")
