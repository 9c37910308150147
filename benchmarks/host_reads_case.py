"""The ranks of `benchmarks/host_reads`: real jobs on gloo ranks, forked from this process. Writes JSON to stdout."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from host_reads_count import HostReads
from host_reads_job import FIRST, LAST, LOG_EVERY, Reads
from lightning.pytorch import LightningModule, Trainer

from trainer.callbacks import guard
from trainer.config.instantiate import freeze
from trainer.config.typed import to_config
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.train import run


def config_of(case: dict[str, Any], folder: Path) -> Any:
    target = "host_reads_job."
    return to_config(
        {
            "name": "reads",
            "runs_dir": str(folder.parent),
            "resources": {"gpus": 0, "cpu_processes": case["ranks"]},
            "trainer": {
                "max_steps": LAST + 2,
                "precision": case["precision"],
                "log_every_n_steps": LOG_EVERY,
                "gradient_clip_norm": case["clip"],
            },
            "checkpoint": {"save_best": False},
            "tracking": {"name": "none"},
            "strategy": {"name": case["strategy"]},
            "cluster": {"name": "local"},
            "model": {"_target_": target + "Net"},
            "data": {"_target_": target + "Data", "batch_size": 8 * case["ranks"]},
            "task": {"_target_": target + "Task"},
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
            "scheduler": {"_target_": "trainer.schedules.warmup_cosine"}
            if case.get("schedule")
            else {"_target_": None},
            "callbacks": {
                "reads": {"_target_": target + "Reads"},
                "norm": {"_target_": "trainer.callbacks.gradient_norm.GradientNorm"},
            },
        }
    )


class Event:
    """Stands in for a CUDA event that has happened."""

    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def query(self) -> bool:
        return True


def act_as_on_a_gpu() -> None:
    """Have the guard check as on a GPU, where it does not read at once."""
    original = guard.Guard.on_train_start

    def on_train_start(self: guard.Guard, trainer: Trainer, module: LightningModule) -> None:
        original(self, trainer, module)
        self._checks_fast = False

    guard.Guard.on_train_start = on_train_start  # type: ignore[method-assign]
    guard._is_on_device = lambda value: True
    torch.cuda.Event = Event  # type: ignore[assignment, misc]


def rank_main(case: dict[str, Any], folder: Path, rank: int, port: int) -> dict[str, Any]:
    ranks = str(case["ranks"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="reads")
    directory = RunDirectory(folder)
    if rank == 0:
        write_atomic(directory.config_path, freeze(asdict(config_of(case, folder))))
        (folder / "ready").touch()
    while not (folder / "ready").exists():
        pass
    act_as_on_a_gpu()
    with HostReads() as reads:
        Reads.reads = reads
        code = run.run(folder)
    if rank == 0 and (code != 0 or directory.attempts()[-1].outcome != "finished"):
        raise RuntimeError(f"exit code {code}: {directory.attempts()}")
    return {"counts": dict(reads.counts), "places": dict(reads.places), "steps": LAST - FIRST + 1}


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fork the ranks; the counts of rank 0."""
    directory = RunDirectory(folder)
    for path in (directory.live_dir, directory.attempts_dir, directory.checkpoints_dir, directory.stop_request.parent):
        path.mkdir(parents=True, exist_ok=True)
    directory.attempt_logs(0).mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(case["ranks"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                found = rank_main(case, folder, rank, port)
                (folder / f"found-{rank}.json").write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children[pid] = rank
    failed = [children[pid] for pid, status in map(lambda pid: os.waitpid(pid, 0), children) if status]
    if failed:
        return {"error": (folder / f"rank-{failed[0]}.log").read_text()[-3000:]}
    return dict(json.loads((folder / "found-0.json").read_text()))


def results(cases: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    for number, case in enumerate(cases):
        yield {**case, **run_case(case, folder / str(number))}


def main() -> None:
    warnings.simplefilter("ignore")
    if any(case["strategy"].startswith("deepspeed") for case in json.loads(sys.argv[1])):
        os.environ["DS_ACCELERATOR"] = "cpu"
        __import__("deepspeed")
    torch.set_num_threads(1)
    for found in results(json.loads(sys.argv[1]), Path(sys.argv[2])):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
