"""The random number generators of one rank: Python, NumPy, torch, CUDA."""

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
    """A seed for what may differ between ranks, dropout for one; the model is built from `seed` itself."""
    return (seed * 1_000_003 + 7919 * (rank + 1)) % 2**63


def state() -> dict[str, Any]:
    """Plain types and tensors only, so that it loads with `weights_only=True`."""
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    assert not isinstance(keys, str)  # its annotation covers the non-legacy form, too
    version, internal, gauss_next = random.getstate()
    found = {
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
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(saved: dict[str, Any]) -> None:
    """The inverse of `state`."""
    version, internal, gauss_next = saved["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"].cpu())
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"].cpu())
