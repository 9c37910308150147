"""A rank that joins the process group as every rank does, and tells its environment; it ends when told to."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from trainer.config.schema import Config
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome
from trainer.runtime import process
from trainer.runtime.torch_setup import init_process_group

TOLD = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "TRAINER_STORE")
PLACE = ("GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def main(path: Path) -> None:
    process.redirect_output(path)
    rank = process.Rank.from_environment()
    config = Config()
    config.resilience.collective_timeout_s = 60.0
    group = init_process_group(config, rank)
    total = torch.tensor([rank.rank])
    torch.distributed.all_reduce(total, group=group)
    assert int(total) == sum(range(rank.world_size))
    said = {"pid": os.getpid(), **{name: os.environ.get(name) for name in (*TOLD, *PLACE)}}
    go = Path(os.environ["GO"])
    Path(f"{go}.{rank.rank}.pid").write_text(str(os.getpid()))
    partial = Path(f"{go}.{rank.rank}.partial")
    partial.write_text(json.dumps(said))
    partial.rename(f"{go}.{rank.rank}")
    while not go.exists():
        time.sleep(0.05)
    others: list[object] = [None] * rank.world_size
    torch.distributed.all_gather_object(others, rank.rank, group=group)  # pickles, of the job's own
    assert others == list(range(rank.world_size))
    torch.distributed.barrier(group)
    torch.distributed.destroy_process_group()
    if rank.rank == 0:
        RunDirectory(path).write_outcome(AttemptOutcome(attempt=rank.attempt, outcome="finished", exit_code=0))
    sys.exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
