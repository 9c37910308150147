"""The keys of Hydra's own node, `hydra.*`, that have an effect here, and the refusal of those that have none.

Supported: `hydra.run.dir` and `hydra.sweep.dir` (a link to the run, which itself is in `runs_dir`),
`hydra.sweeper.params`, `hydra.mode`, `hydra.searchpath`, `hydra.verbose`, `hydra.job_logging`, and of `hydra.job`:
`chdir`, `env_set`, `name`. Other keys are refused with a replacement; none is silently ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.config.optuna_sweeper import TARGET as OPTUNA
from trainer.core.errors import UserError

SUBDIR = ".hydra"
DEFAULT_SWEEP_DIR = "multirun/${now:"
"""How Hydra's own `hydra.sweep.dir` begins."""
_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
NOT_USED = "trainer does not use this part of Hydra"
INSTEAD = {
    "launcher": "cluster=slurm or cluster=local chooses where a job runs; with -m also the jobs of a sweep, "
    "cluster.sweep_at_once at a time",
    "sweeper": "-m runs one job for each combination, including hydra.sweeper.params; for a search use "
    "hydra/sweeper=optuna or sweep.method=tpe",
    "callbacks": "use a Lightning callback in the section callbacks, which runs in the ranks",
    "output_subdir": f"remove it: a run keeps Hydra's files in {SUBDIR}, where its ranks read them",
}
"""Replacement for each unused part."""


def problems_of_hydra(tree: Any) -> Iterator[UserError]:
    """Yield an error for each key of a composed tree's node `hydra` that has no effect here."""
    node, choices = tree.hydra, tree.hydra.runtime.choices
    for part, own in (("launcher", _LAUNCHER), ("sweeper", _SWEEPER)):
        chosen = choices.get(f"hydra/{part}")
        written = part_of(node, part)
        if part == "sweeper" and written.get("_target_") == OPTUNA:  # a single job does not use it, as in Hydra
            continue
        if chosen not in (None, "basic") or written.get("_target_", own) != own:
            shown = f"hydra/{part}={chosen}" if chosen else f"hydra.{part}._target_={written['_target_']}"
            yield UserError(f"{shown}: {NOT_USED}", f"remove it; {INSTEAD[part]}")
            continue
        taken = ("_target_", "params") if part == "sweeper" else ("_target_",)
        for key, value in written.items():
            if key not in taken and value is not None:
                yield UserError(f"hydra.{part}.{key}: {NOT_USED}", f"remove it; {INSTEAD[part]}")
    for name in node.get("callbacks") or {}:
        yield UserError(f"hydra.callbacks.{name}: {NOT_USED}", f"remove it; {INSTEAD['callbacks']}")
    yield from problems_of_logging(part_of(node, "job_logging"))
    if node.output_subdir != SUBDIR:
        shown = "null" if node.output_subdir is None else node.output_subdir
        yield UserError(f"hydra.output_subdir={shown}: {NOT_USED}", INSTEAD["output_subdir"])


_LOGGING_CLASSES = {
    *("logging.Formatter", "logging.NullHandler", "logging.StreamHandler", "logging.FileHandler", "logging.Filter"),
    *("logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler"),
    *("logging.handlers.WatchedFileHandler", "logging.handlers.MemoryHandler"),
    *("colorlog.ColoredFormatter", "rich.logging.RichHandler"),
}
"""What `class` and `()` of `hydra.job_logging` may name: logging calls them."""
_LOG_FILES = (".log", ".txt", ".out")


def problems_of_logging(node: Any, where: str = "hydra.job_logging") -> Iterator[UserError]:
    """Yield an error for each class, object and file name that the configuration of `logging` must not have."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from problems_of_logging(item, f"{where}[{i}]")
    elif isinstance(node, dict):
        for key, value in node.items():
            here, text = f"{where}.{key}", str(value)
            if key in ("()", "class", "formatClass", "queue", "listener", "factory") and text not in _LOGGING_CLASSES:
                fix = f"use one of {', '.join(sorted(_LOGGING_CLASSES))}, or set up logging in your code"
                yield UserError(f"{here}={text}: refused, because logging would call it", fix)
            elif key in ("filename", "baseFilename") and not text.endswith(_LOG_FILES):
                fix = f"end its name in {', '.join(_LOG_FILES)}"
                yield UserError(f"{here}={text}: refused, because this is no log file", fix)
            elif isinstance(value, str) and "ext://" in value and value not in ("ext://sys.stdout", "ext://sys.stderr"):
                yield UserError(f"{here}={text}: refused, because logging would import it", "use ext://sys.stderr")
            else:
                yield from problems_of_logging(value, here)


def sweep_params(tree: Any) -> dict[str, str]:
    """Return `hydra.sweeper.params`: values by override key, as text."""
    params = part_of(tree.hydra, "sweeper").get("params")
    return {str(key): str(value) for key, value in (params or {}).items()}


def is_multirun(tree: Any) -> bool:
    """Return whether `hydra.mode` is MULTIRUN."""
    mode = tree.hydra.mode
    return mode is not None and getattr(mode, "name", mode) == "MULTIRUN"


def part_of(node: Any, part: str) -> dict[Any, Any]:
    """Return `hydra.PART` without resolving interpolations; empty if it is null or missing."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(node, part) or node._get_node(part)._is_none():
        return {}
    content = OmegaConf.to_container(node._get_node(part), resolve=False)
    return content if isinstance(content, dict) else {}


def replaced(value: Any, old: str, new: str) -> Any:
    """Return `value` with `old` replaced by `new` in every string at any depth."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {key: replaced(item, old, new) for key, item in value.items()}
    return [replaced(item, old, new) for item in value] if isinstance(value, list) else value


@contextmanager
def without_parts(unused: tuple[str, ...]) -> Iterator[None]:
    """Remove unused parts of Hydra from its defaults list, which saves 12% of the CPU time of `--cfg job`.

    This defaults list has the lowest priority. A config file or a command line that chooses one of these parts is still
    composed, or refused.
    """
    from hydra.core.config_store import ConfigStore

    root = ConfigStore.instance().repo["hydra"]["config.yaml"].node
    before = list(root.defaults)
    root.defaults = [
        {part: None if part in unused else option for part, option in default.items()} for default in before
    ]
    try:
        yield
    finally:
        root.defaults = before
