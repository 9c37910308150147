"""One of two gloo ranks that train two real steps of the cases of `test_ranks.py`, and print their memory as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import deepspeed.ops
import torch

from tests.plan.drawn import batch_of, module_of, optimizer_of, setting_of
from tests.plan.ranks_cases import CASES
from trainer.plan.simulation import steps, wrapper
from trainer.plan.tracked import Tracked

if __name__ == "__main__":
    rank, path = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled (`strategies/deepspeed_zero.py`)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = []
    for case in CASES:
        setting = setting_of(case)
        with Tracked(case.model["vocab_size"], 1, is_gloo=True) as tracked, tracked.resizing():
            module = module_of(case)
            wrapper(setting)(module)
            real = steps(module, batch_of(case), lambda one, case=case: optimizer_of(case, one), setting, tracked)
        found.append(asdict(real))
        del module
    torch.distributed.destroy_process_group()
    print(json.dumps(found))
