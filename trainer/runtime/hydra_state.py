"""Set up Hydra in a rank: HydraConfig and the working directory as `@hydra.main` does, and the logging of the job.

`HydraConfig.get()`, `hydra.utils.get_original_cwd()` and `to_absolute_path()` then work as in any Hydra job. The
variables of `hydra.job.env_set` are already in the environment (`trainer/supervise/rank_environment.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from trainer.config import instantiate
from trainer.config.hydra_node import problems_of_logging
from trainer.config.hydra_record import hydra_node
from trainer.config.problems import raise_all
from trainer.config.schema import Config
from trainer.runs.directory import RunDirectory


def load(run: RunDirectory) -> Config:
    """Load the frozen configuration of the run, and set the state of Hydra unless the run was made without Hydra."""
    node = hydra_node(run.path)
    if node:
        enter(node, run.path)
    return instantiate.load(run.config_path)


def enter(node: dict[str, Any], run_path: Path) -> None:
    """Set HydraConfig from the node `hydra`, and change the working directory if `hydra.job.chdir` is set."""
    node["runtime"]["output_dir"] = str(run_path)
    holder: Any = HydraConfig.instance()
    holder.__class__ = _OnDemand
    holder.make = partial(_whole, node)
    if node["job"].get("chdir"):
        os.chdir(run_path)


class _OnDemand(HydraConfig):
    """Hydra's holder, which makes the configuration when it is first read: 0.08 s of CPU that most jobs do not need."""

    make: Callable[[], DictConfig] | None = None
    made: Any = None

    @property
    def cfg(self) -> Any:
        if self.make is not None:
            make, self.make = self.make, None
            self.set_config(make())
        return self.made

    @cfg.setter
    def cfg(self, value: Any) -> None:
        self.make, self.made = None, value


def _whole(node: dict[str, Any]) -> DictConfig:
    schema = OmegaConf.structured(HydraConf)
    OmegaConf.set_struct(schema, False)
    whole = OmegaConf.merge(schema, {key: value for key, value in node.items() if value != "???"})
    return OmegaConf.create({"hydra": whole})


def configure_logging(run: RunDirectory) -> None:
    """Apply `hydra.job_logging`, if the job has one, and `hydra.verbose`."""
    node = hydra_node(run.path)
    written, verbose = node.get("job_logging"), node.get("verbose")
    if isinstance(written, dict) and written.get("root") is not None:
        from hydra._internal.logging_config import configure_logging

        raise_all(list(problems_of_logging(written)))
        configure_logging(written)
    names = [verbose] if isinstance(verbose, str) else verbose if isinstance(verbose, list) else []
    for logger in [logging.getLogger()] if verbose is True else map(logging.getLogger, names):
        logger.setLevel(logging.DEBUG)
