"""What the guard against non-finite values costs a step on this machine: `python benchmarks/guard.py`.

The number of a step (`FiniteGuard._value`) and its reading, for a network of 0.05 and of 1 million parameters.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from trainer.callbacks.guard import _gradients

REPEATS = 2000


def main() -> None:
    torch.set_num_threads(1)
    for width in (128, 512):
        network = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())])
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.randn(8, width)).sum().backward()
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            bool(torch.isfinite(torch.stack(torch._foreach_norm(_gradients(optimizer))).sum()))
            times.append(time.perf_counter() - began)
        count = sum(parameter.numel() for parameter in network.parameters())
        median_us = 1e6 * statistics.median(times)
        print(f"{count:>9,} parameters: {median_us:6.1f} us a step, {median_us / 200:.2f}% of 20 ms")


if __name__ == "__main__":
    main()
