"""One rank of the comparison with plain Lightning: `rank.py FOLDER CASE...`, started by `fork_ranks.py`.

Every case is trained twice in this process, by Lightning's Trainer as it comes and by a run of ours from its frozen
configuration; only starting processes is left out. After each case the first rank writes what came out to
`FOLDER/results.json`.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import traceback
import warnings
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import torch.distributed as dist
import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from tests.oracle.cases import CASES, CONFIGS, Case
from trainer.checkpoint.io import load_state
from trainer.checkpoint.store import CheckpointStore
from trainer.config.compose import Composed, compose, frozen_hydra
from trainer.config.hydra_files import HydraFiles
from trainer.config.instantiate import freeze
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory

EPOCHS = 2
LONGEST = timedelta(seconds=120)
"""A rank that failed waits so long for one that does not know yet."""
Outcome = dict[str, Any]
"""`weights`: name to tensor; `step`, `metrics`, and of ours the step `logged` last; or `error`."""


def main() -> None:
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    world = int(os.environ["WORLD_SIZE"])
    groups = Groups(world)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {}
    for number, case in enumerate(CASES):
        if case.name not in wanted:
            continue
        began = time.monotonic()
        groups.renew()
        theirs = attempted(lambda case=case, number=number: stock(case, folder / f"stock-{number}"))
        groups.renew()
        ours = attempted(lambda case=case, number=number: run_of_ours(case, folder, number))
        results[case.name] = {**compared(ours, theirs), "seconds": round(time.monotonic() - began, 2)}
        print(case.name, results[case.name], flush=True)
        if dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(results))


class Groups:
    """A new group of the ranks for each job, in which what an earlier one left behind cannot be in the way."""

    def __init__(self, world: int) -> None:
        self.init, self.destroy = dist.init_process_group, dist.destroy_process_group
        rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
        self.rank, self.world = rank, world
        self.store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0, timeout=LONGEST)
        self.number = 0
        dist.init_process_group = lambda *_, **__: None
        dist.destroy_process_group = lambda *_, **__: None

    def renew(self) -> None:
        """Wait for the other ranks, and begin again with them."""
        if dist.is_initialized():
            self.destroy()
        gc.collect()  # what holds threads of an old group must not be found by a worker process forked later
        gc.freeze()  # modules: visiting them again took a quarter of the time
        self.number += 1
        store = dist.PrefixStore(str(self.number), self.store)
        self.init("gloo", store=store, rank=self.rank, world_size=self.world, timeout=LONGEST)
        dist.barrier()


def attempted(job: Any) -> Outcome:
    try:
        return job()
    except BaseException as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:800]}


def stock(case: Case, folder: Path) -> Outcome:
    """Lightning alone, as a script of the user's own would call it."""
    seed_everything(0, verbose=False)
    module = hydra.utils.instantiate(case.node("model"))
    data: LightningDataModule | None = hydra.utils.instantiate(case.node("data")) if case.data else None
    options: dict[str, Any] = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    options |= {"enable_progress_bar": False, **case.trainer, **case.stock}
    with_checkpoints = any("ModelCheckpoint" in node["_target_"] for node in case.callbacks)
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=("ddp_find_unused_parameters_true" if case.unused else "ddp") if dist.get_world_size() > 1 else "auto",
        plugins=[TorchElasticEnvironment()] if dist.get_world_size() > 1 else None,
        callbacks=[hydra.utils.instantiate(node) for node in case.callbacks],
        logger=logger_of(folder),
        enable_checkpointing=with_checkpoints,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **options,
    )
    if dist.get_world_size() > 1:
        # On several ranks Lightning shuffles a training loader that does not shuffle. We do not, so that a job is the
        # same on any number of ranks; docs/migrate.md says so.
        connector = trainer._data_connector
        connector._prepare_dataloader = partial(_unshuffled, connector._prepare_dataloader)  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return {"weights": weights, "step": trainer.global_step, "metrics": metrics}


def _unshuffled(prepare: Any, loader: Any, shuffle: bool, mode: Any) -> Any:
    return prepare(loader, shuffle=False, mode=mode)


def logger_of(folder: Path) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(str(folder))


def run_of_ours(case: Case, folder: Path, number: int) -> Outcome:
    """A run as `trainer fit` makes it, trained by what torchrun would have started."""
    from trainer.train.run import run

    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            chosen = [str(made(case, folder, number).path)]
        except BaseException as error:
            traceback.print_exc()
            chosen = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], BaseException):
        raise chosen[0]
    directory = RunDirectory(Path(chosen[0]))
    code = run(directory.path)
    HydraConfig.instance().cfg = None
    outcomes = directory.attempts()
    if code != 0 or not outcomes or outcomes[-1].outcome != "finished":
        return {"error": f"exit code {code}, {outcomes[-1:]}"}
    if dist.get_rank() != 0:
        return {}
    newest = CheckpointStore(directory.checkpoints_dir).committed()[-1]
    state = load_state(newest.path)
    live = directory.heartbeat(0)
    return {
        "weights": state["state_dict"],
        "step": newest.step,
        "metrics": (live and live.validation) or {},
        "logged": json.loads(directory.metrics_path.read_text().splitlines()[-1])["step"],
    }


def made(case: Case, folder: Path, number: int) -> RunDirectory:
    """The run directory of this case, checked, with what a rank reads of it.

    Composing takes longer than training. Cases with the same options share a composition, and have their parts put into
    it; those whose point is the configuration are composed from files of their own.
    """
    from trainer.cli.job import check_one, freeze_shape

    if case in CONFIGS or case.data is None:
        composed, hydra = composition(case, folder / f"conf-{number}", folder)
    else:
        alike = replace(Case("any"), trainer=case.trainer, overrides=case.overrides, unused=case.unused)
        key = repr(alike)
        if key not in _COMPOSED:
            _COMPOSED[key] = composition(alike, folder / f"conf-{number}", folder)
        composed, hydra = _COMPOSED[key]
        composed = replace(composed, config={**deepcopy(composed.config), **parts(case)})
    shape, _ = check_one(composed)
    freeze_shape(composed.config, shape)
    directory = RunDirectory.new(Path(composed.config["runs_dir"]), composed.config["name"])
    write_atomic(directory.config_path, freeze(hydra.keep(directory.path, composed.config, folder)))
    return directory


_COMPOSED: dict[str, tuple[Composed, HydraFiles]] = {}


def parts(case: Case) -> dict[str, Any]:
    """The case's own sections of the configuration."""
    callbacks = {f"one_{place}": node for place, node in enumerate(case.callbacks)}
    data = {"data": case.node("data")} if case.data else {}
    return {"model": case.node("model"), "callbacks": callbacks, **data}


def composition(case: Case, files: Path, folder: Path) -> tuple[Composed, HydraFiles]:
    """The configuration as `trainer fit` composes it from the user's files, and Hydra's own files of it."""
    for group, node in parts(case).items():
        (files / group).mkdir(parents=True)
        (files / group / "it.yaml").write_text(yaml.safe_dump(node))
    options = {"max_epochs": EPOCHS, "log_every_n_steps": 1, **case.trainer}
    overrides = [
        *(f"{group}=it" for group in parts(case)),
        *(f"trainer.{name}={value}" for name, value in options.items()),
        f"strategy.find_unused_parameters={case.unused}",
        "tracking=none",
        *case.overrides,
        "name=case",
        f"runs_dir={folder / 'runs'}",
        f"resources.cpu_processes={dist.get_world_size()}",
        "resources.gpus=0",
        "checkpoint.asynchronous=false",
        "resilience.collective_timeout_s=10",
        "resilience.hang_slow_s=10",
    ]
    composed = compose(overrides, config_dirs=[files], cwd=folder)
    return composed, frozen_hydra(composed)


def compared(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Plain values for the test: what failed, how far the weights are apart, and the rest side by side."""
    found: dict[str, Any] = {"ours": ours.get("error"), "theirs": theirs.get("error")}
    if ours.get("error") or theirs.get("error") or not ours:
        return found
    names = sorted(set(ours["weights"]) ^ set(theirs["weights"]))
    found["only in one"] = names
    found["apart"] = max(
        (
            float((ours["weights"][name].double() - theirs["weights"][name].double()).abs().max())
            for name in ours["weights"]
            if name not in names and ours["weights"][name].numel()
        ),
        default=0.0,
    )
    found["steps"] = [ours["step"], theirs["step"]]
    validated = [name for name in theirs["metrics"] if name.startswith("val_")]
    found["metrics"] = {name: [ours["metrics"].get(name), theirs["metrics"][name]] for name in validated}
    found["logged"] = ours["logged"]
    return found


if __name__ == "__main__":
    main()
