"""Hydra in a rank: HydraConfig and the working directory as `@hydra.main` leaves them, and the logging of the job.

`HydraConfig.get()`, `hydra.utils.get_original_cwd()` and `to_absolute_path()` then answer as in any Hydra job. The
variables of `hydra.job.env_set` are in the environment already (`trainer/supervise/torchrun.py`).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from trainer.config import instantiate
from trainer.config.hydra_record import hydra_node
from trainer.config.schema import Config
from trainer.runs.directory import RunDirectory


def load(run: RunDirectory) -> Config:
    """The run's frozen configuration, with Hydra's state as in a job of its own. For runs without one: none."""
    node = hydra_node(run.path)
    if node:
        enter(node, run.path)
    return instantiate.load(run.config_path)


def enter(node: dict[str, Any], run_path: Path) -> None:
    """Set HydraConfig from what is inside `hydra:`, and change the working directory where that asks for it."""
    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    node["runtime"]["output_dir"] = str(run_path)
    schema = OmegaConf.structured(HydraConf)
    OmegaConf.set_struct(schema, False)
    whole = OmegaConf.merge(schema, {key: value for key, value in node.items() if value != "???"})
    HydraConfig.instance().set_config(OmegaConf.create({"hydra": whole}))
    if node["job"].get("chdir"):
        os.chdir(run_path)


def configure_logging(run: RunDirectory) -> None:
    """As `hydra.job_logging` has it, where the job chose one, and `hydra.verbose`."""
    node = hydra_node(run.path)
    written, verbose = node.get("job_logging"), node.get("verbose")
    if isinstance(written, dict) and written.get("root") is not None:
        from hydra._internal.logging_config import configure_logging

        configure_logging(written)
    names = [verbose] if isinstance(verbose, str) else verbose if isinstance(verbose, list) else []
    for logger in [logging.getLogger()] if verbose is True else map(logging.getLogger, names):
        logger.setLevel(logging.DEBUG)
