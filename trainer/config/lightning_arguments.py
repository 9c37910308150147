"""Arguments of Lightning's Trainer that the schema does not have."""

from __future__ import annotations

TAKEN = (
    "accelerator",
    "barebones",
    "callbacks",
    "devices",
    "enable_autolog_hparams",
    "enable_checkpointing",
    "enable_progress_bar",
    "fast_dev_run",
    "logger",
    "model_registry",
    "num_nodes",
    "plugins",
    "strategy",
)
"""Arguments of Lightning's Trainer that are not in the schema: `lightning_keys.py` translates or refuses them."""
