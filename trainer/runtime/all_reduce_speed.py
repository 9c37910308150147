"""Run one rank of the speed test of preflight and doctor: join, all-reduce, print `ReduceSpeed`.

    python -m trainer.runtime.all_reduce_speed DEVICE TIMEOUT_S TOKEN [LISTENER]

LISTENER is the descriptor of the socket on which rank 0 serves the others.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed
from torch.distributed import PrefixStore, TCPStore

from trainer.core import records
from trainer.runtime import speed
from trainer.runtime.reduce_answer import ReduceSpeed

_BYTES = {"cpu": 4_000_000, "cuda": 256_000_000}
_REPEATS = 3


def main(device: str, timeout_s: str, token: str, listener: str | None = None) -> None:
    """Measure the all-reduce and a matrix product; print both."""
    backend = "nccl" if device == "cuda" else "gloo"
    timeout = timedelta(seconds=float(timeout_s))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if listener is None:
        store = TCPStore(address, port, timeout=timeout)
    else:
        store = TCPStore(address, port, is_master=True, timeout=timeout, master_listen_fd=int(listener))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        backend, store=PrefixStore(token, store), rank=rank, world_size=world_size, timeout=timeout
    )
    found = ReduceSpeed(joined=True)
    print(records.dumps(found), flush=True)
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    values = torch.ones(_BYTES[device] // 4, device=place)
    torch.distributed.all_reduce(values)
    best_s = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        torch.distributed.all_reduce(values)
        if device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - began)
    kind = "fp32" if device == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    found = replace(found, bytes_per_s=_BYTES[device] / best_s)
    print(records.dumps(found), flush=True)
    try:
        print(records.dumps(replace(found, kind=kind, flops_s=speed.matrix_flops(place, kind))), flush=True)
    except RuntimeError as problem:  # no memory left, no such product: the ranks can train all the same
        print(f"no matrix rate: {problem}", file=sys.stderr)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
