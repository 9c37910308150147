"""Seed, save and restore the random number generators of a rank: Python, NumPy, torch, CUDA."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def seed_all(seed: int) -> None:
    """Seed Python, NumPy, torch and every CUDA device with `seed` (0 <= seed)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_of_rank(seed: int, rank: int) -> int:
    """Return a seed for what may differ between ranks, such as dropout. The model is built from `seed` itself."""
    return (seed * 1_000_003 + 7919 * (rank + 1)) % 2**63


def state() -> dict[str, Any]:
    """Return the state of all generators in plain types and tensors, which load with `weights_only=True`."""
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    assert not isinstance(keys, str)  # the annotation covers the non-legacy form as well
    version, internal, gauss_next = random.getstate()
    states = {
        "python": [version, list(internal), gauss_next],
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype("int64")),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(saved: dict[str, Any]) -> None:
    """Restore a state that `state` returned."""
    version, internal, gauss_next = saved["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"].cpu())
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"].cpu())
