"""The environment variables that a configuration may read (`${oc.env:...}`) and set (`hydra.job.env_set`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from trainer.core.errors import UserError
from trainer.core.secrets import known, looks_secret, password_in

READABLE = (
    *("TRAINER_*", "SLURM_JOB_*", "USER", "HOME", "TMPDIR", "SCRATCH", "WORK", "PROJECT_ROOT"),
    "MLFLOW_TRACKING_URI",
)
"""Variables that any configuration may read."""
_SETTABLE = (
    *(
        "OMP_*",
        "MKL_*",
        "KMP_*",
        "OPENBLAS_NUM_THREADS",
        "NUMEXPR_*",
        "CUBLAS_WORKSPACE_CONFIG",
        "NVIDIA_TF32_OVERRIDE",
    ),
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_ORDER", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("NCCL_*", "TORCH_NCCL_*", "GLOO_SOCKET_IFNAME", "TORCH_LOGS", "TORCH_DISTRIBUTED_DEBUG", "TORCH_CPP_LOG_LEVEL"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "HYDRA_FULL_ERROR", "PL_*"),
    *(
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "TRANSFORMERS_VERBOSITY",
        "TZ",
        "LANG",
        "LC_ALL",
    ),
    *("WANDB_MODE", "WANDB_SILENT", "WANDB_CONSOLE", "WANDB_NOTES", "WANDB_TAGS", "TF_CPP_MIN_LOG_LEVEL"),
)
"""Variables that any configuration may set: they choose no code and no address."""
_NOT_SETTABLE = ("NCCL_*PLUGIN*", "NCCL_*FILE*", "NCCL_CONF*", "PL_*PATH*")


def may_read(name: str, named: Iterable[str]) -> bool:
    """Return whether `${oc.env:NAME}` is allowed; `named` is `security.env`. A secret never is."""
    return not looks_secret(name) and any(fnmatchcase(name, one) for one in (*READABLE, *named))


def may_set(name: str, named: Iterable[str]) -> bool:
    """Return whether `hydra.job.env_set.NAME` is allowed; `named` is `security.env`."""
    if name in named:
        return True
    return any(fnmatchcase(name, one) for one in _SETTABLE) and not any(fnmatchcase(name, one) for one in _NOT_SETTABLE)


def read(name: str, named: Iterable[str]) -> str | None:
    """Return the value of a variable, None if it is not set.

    Raises:
        PermissionError: A configuration must not read it.
    """
    value = os.environ.get(name)
    if value is None:
        return None
    if looks_secret(name) or password_in(value):
        raise PermissionError(f"{name} looks like a secret, which a config must not read: read os.environ in your code")
    if not may_read(name, named):
        raise PermissionError(f"a config may not read the variable {name}: to allow it, add security.env=[{name}]")
    return value


def problems_of_job(tree: Any) -> Iterator[UserError]:
    """Yield the variables that `hydra.job.env_set` and `hydra.job.env_copy` must not set or copy."""
    from omegaconf import OmegaConf

    named = named_in(tree)
    job = OmegaConf.to_container(tree.hydra.job, resolve=False)
    assert isinstance(job, dict)
    copied = [str(name) for name in job.get("env_copy") or ()]
    for name in copied:
        if not may_read(name, named):
            fix = "remove it: ranks inherit the environment" if looks_secret(name) else f"add security.env=[{name}]"
            yield UserError(f"hydra.job.env_copy: a config may not read the variable {name}", fix)
    for name in job.get("env_set") or {}:
        if name not in copied and not may_set(str(name), named):
            fix = f"set it in the shell, or add security.env=[{name}] if it runs nothing that you do not trust"
            yield UserError(f"hydra.job.env_set.{name}: a config may not set this variable", fix)


def named_in(root: Any) -> tuple[str, ...]:
    """Return `security.env` of a composed tree."""
    section = root._get_node("security") if hasattr(root, "_get_node") else None
    node = section._get_node("env") if section is not None and hasattr(section, "_get_node") else None
    items = node._content if node is not None and isinstance(getattr(node, "_content", None), list) else []
    return tuple(str(item._value()) for item in items)


def problems_of_secrets(value: Any, where: str = "") -> Iterator[UserError]:
    """Yield an error for each text that holds the value of a secret variable: the run would keep it, masked."""
    secrets = known()
    pending: list[tuple[str, Any]] = [(where, value)] if secrets else []
    while pending:
        key, item = pending.pop()
        if isinstance(item, dict):
            pending += [(f"{key}.{name}" if key else str(name), inner) for name, inner in item.items()]
        elif isinstance(item, list):
            pending += [(f"{key}[{i}]", inner) for i, inner in enumerate(item)]
        elif isinstance(item, str):
            variable = next((name for secret, name in secrets.items() if secret in item), None)
            if variable is not None:
                fix = f"remove it: ranks inherit the environment, so read os.environ[{variable!r}] in your code"
                yield UserError(f"{key}: has the value of {variable}, which a run must not store", fix)
