"""The targets that a config may name.

People exchange config files as data, but a `_target_` is called. Hydra's own block list still allows
`pathlib.Path.write_text`, `urllib.request.urlopen`, `torch.load` and `torch.hub.load`. Here the standard library is
blocked except for modules that only compute. In the packages of every installation, the functions that access files,
processes or networks are blocked by name. The user's packages are not restricted.
"""

from __future__ import annotations

import sys

from trainer.core.errors import UserError

_COMPUTING = {
    *("collections", "copy", "datetime", "decimal", "enum", "fractions", "functools", "itertools", "math"),
    *("numbers", "random", "statistics", "string", "typing"),
}
_CLOSED_PACKAGES = {
    *("fsspec", "cloudpickle", "dill", "joblib", "requests", "urllib3", "httpx", "aiohttp", "paramiko"),
    *(
        "pip",
        "setuptools",
        "pkg_resources",
        "IPython",
        "hydra",
        "omegaconf",
        "psutil",
        "yaml",
        "cffi",
        "numba",
    ),
}
_CLOSED_PATHS = (
    *(
        "torch.load",
        "torch.save",
        "torch.hub",
        "torch.package",
        "torch.serialization",
        "torch.utils.cpp_extension",
    ),
    *(
        "torch.utils.model_zoo",
        "torch.utils.file_baton",
        "torch.utils.collect_env",
        "torch.jit.load",
        "torch.ops",
    ),
    *(
        "torch.distributed.run",
        "torch.distributed.launch",
        "torch.distributed.elastic",
        "torch.distributed.rpc",
    ),
    *("torch.multiprocessing", "torch._inductor", "torch.classes", "torch.export.load", "torch.compiler"),
    *(
        "numpy.load",
        "numpy.save",
        "numpy.savez",
        "numpy.savetxt",
        "numpy.loadtxt",
        "numpy.fromfile",
        "numpy.memmap",
    ),
    *("numpy.genfromtxt", "numpy.f2py", "numpy.distutils", "numpy.testing", "numpy.lib.npyio"),
    *("deepspeed.launcher", "deepspeed.ops.op_builder", "trainer.cli"),
    *("trainer.runs", "trainer.core", "trainer.supervise", "trainer.slurm", "trainer.launch", "trainer.starter"),
)
DISCOVERY = {f"hydra.utils.get_{kind}" for kind in ("class", "method", "static_method", "object")}
"""Functions that return the object at their argument `path`, which is checked like a `_target_`."""
OPEN_PATHS = {
    *DISCOVERY,
    *("hydra.utils.to_absolute_path", "hydra.utils.get_original_cwd"),
    *("omegaconf.DictConfig", "omegaconf.ListConfig", "omegaconf.OmegaConf.create", "omegaconf.OmegaConf.to_container"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.omegaconf.OmegaConf.create", "omegaconf.omegaconf.OmegaConf.to_container"),
}
"""Functions of blocked packages that only compute."""


def refusal(path: str) -> str | None:
    """Return the reason why the dotted `path` must not be called; None if it may be."""
    if path in OPEN_PATHS:
        return None
    top = path.partition(".")[0]
    if top in sys.stdlib_module_names and top not in _COMPUTING:
        return f"{top} of Python's standard library reaches files, processes or the interpreter"
    if top in _CLOSED_PACKAGES:
        return f"the package {top} reaches files, processes or networks"
    for closed in _CLOSED_PATHS:
        if path == closed or path.startswith(closed + "."):
            return f"{closed} reaches files, processes or networks"
    if any(part.startswith("__") for part in path.split(".")):
        return "names that begin with two underscores reach the interpreter"
    return None


def require_allowed(path: str, where: str) -> None:
    """Raise UserError if the `_target_` at the key `where` must not be called."""
    reason = refusal(path)
    if reason:
        raise UserError(
            f"{where}={path}: refused, because {reason}",
            "name a model, data module, optimizer or callback, or write your own function",
        )
