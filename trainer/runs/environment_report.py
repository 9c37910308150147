"""Collect what a bug report needs: versions, hardware, cluster, settings; no secrets, no names of people."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.core.gpus import inventory, torch_build
from trainer.core.host_memory import available_bytes
from trainer.core.secrets import MASK, looks_secret, mask, password_in
from trainer.runs.manifest import environment

_PREFIXES = (
    *("TRAINER_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "OMP_", "MKL_"),
    *("HYDRA_", "DS_", "HF_HUB_OFFLINE", "SLURM_", "SLURMD_", "LD_", "PYTHON"),
)
_NAMES = {"WANDB_MODE", "WANDB_BASE_URL", "WANDB_DISABLED", "CONDA_DEFAULT_ENV", "VIRTUAL_ENV", "TMPDIR", "LANG"}
_PEOPLE = ("SLURM_JOB_USER", "SLURM_JOB_ACCOUNT", "SLURM_JOB_UID", "SLURM_JOB_GID", "SLURM_JOB_NAME", "SLURM_JWT")
_IN_URL = re.compile(r"(https?://)[^/@\s]+@")


def report(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the report as plain data. Imports no torch; takes a fraction of a second."""
    known = environment()
    build, gpus = torch_build(), inventory()
    home = str(Path.home())
    return {
        "trainer": __version__,
        "python": known["python"],
        "executable": _anonymous(sys.executable, home),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "distribution": _distribution(),
        "torch_build": None if build is None else f"{build.kind} {build.version}".strip(),
        "packages": known["installed"]["versions"],
        "origins": {name: _anonymous(mask(text), home) for name, text in known["installed"]["origins"].items()},
        "machine": {
            "cpu": known["machine"]["cpu"],
            "cores": known["machine"]["cores"],
            "memory_bytes": available_bytes(),
            "container": _container(environ),
        },
        "gpus": [gpu.name for gpu in gpus.gpus],
        "gpu_problem": None if gpus.problem is None else gpus.problem.message,
        "driver_cuda": next((gpu.driver_cuda for gpu in gpus.gpus if gpu.driver_cuda), None),
        "variables": variables(environ, home),
    }


def variables(environ: Mapping[str, str], home: str) -> dict[str, str]:
    """Return the variables that change how a job runs, without secrets and names of people."""
    shown = {}
    for name in sorted(environ):
        value = environ[name]
        if name in _PEOPLE or not (name.startswith(_PREFIXES) or name in _NAMES):
            continue
        hidden = looks_secret(name) or password_in(value) is not None
        shown[name] = MASK if hidden else _anonymous(_IN_URL.sub(r"\1", mask(value, environ)), home)
    return shown


def _anonymous(text: str, home: str) -> str:
    return text.replace(home, "~") if len(home) > 1 else text


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _container(environ: Mapping[str, str]) -> str | None:
    """Return the kind of container that this process runs in, as far as it shows."""
    for name, kind in (("APPTAINER_CONTAINER", "apptainer"), ("SINGULARITY_CONTAINER", "singularity")):
        if environ.get(name):
            return kind
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if Path(path).exists():
            return kind
    return None
