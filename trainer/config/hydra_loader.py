"""Hydra's loader of a job: its search path, and the tree of the chosen groups."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import hydra_errors
from trainer.config.hydra_node import without_parts
from trainer.core.errors import UserError
from trainer.core.paths import conf_dir


def loader_of(config_dirs: Sequence[Path], cwd: Path) -> Any:
    """Return Hydra's loader of `config_dirs`, then `conf` of the working directory, then the shipped groups.

    Raises:
        UserError: One of `config_dirs` does not exist.
    """
    from hydra import version
    from hydra._internal.utils import create_config_search_path
    from hydra.core.utils import JobRuntime, setup_globals

    from trainer.config.files import ConfigLoader
    from trainer.config.optuna_sweeper import register

    register()
    version.setbase("1.3")
    setup_globals()
    JobRuntime.instance().set("name", "trainer")
    search_path = create_config_search_path(str(conf_dir()))
    for provider, directory in reversed(_folders(config_dirs, cwd)):
        search_path.prepend(provider, f"file://{directory}")
    return ConfigLoader(search_path)


def load_tree(loader: Any, config_name: str, groups: list[str], sweep: bool = False) -> Any:
    """Load the tree with Hydra; with `sweep` that of a whole sweep, in which some groups may not be chosen yet."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    with without_parts(hydra_errors.UNUSED_PARTS), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree = loader.load_configuration(config_name, groups, RunMode.MULTIRUN if sweep else RunMode.RUN)
    for warning in caught:
        absent = re.search(r"provider=(.*), path=(.*) is not available", str(warning.message))
        if absent:
            fix = "create it, or name one that exists"
            raise UserError(f"{absent[1]}: no such directory: {absent[2]}", fix)
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    OmegaConf.set_struct(tree, False)
    return tree


def _folders(config_dirs: Sequence[Path], cwd: Path) -> list[tuple[str, Path]]:
    path = []
    for directory in config_dirs:
        absolute = directory if directory.is_absolute() else cwd / directory
        if not absolute.is_dir():
            raise UserError(
                f"--config-dir {directory}: no such directory",
                f"create it, or name one that exists (looked for {absolute})",
            )
        path.append(("command-line", absolute))
    users = cwd / "conf"
    if users.is_dir() and users.resolve() != conf_dir().resolve():
        path.append(("working-directory", users))
    return path
