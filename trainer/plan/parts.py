"""Parts of the memory of a rank, under the names that the plan prints. Nothing in this file imports torch."""

from __future__ import annotations

PARAMETERS = "parameters"
"""Parameters and buffers, or this rank's shards of them."""
GRADIENTS = "gradients"
"""Gradients as the optimizer reads them; with ddp they are views of its buckets."""
OPTIMIZER = "optimizer"
"""Optimizer states, and fp32 master weights."""
COPIES = "weight copies"
"""Copies of weights in the type of matrix products, which autocast keeps for the backward pass."""
BUCKETS = "gathered and buckets"
"""Gathered weights, gradients before they are reduced, and the buffers of collectives."""
LOGITS = "logits"
"""Tensors with one number per token id or class."""
REST = "activations"
"""All else: what the backward pass needs, and temporary tensors."""

PARTS = (PARAMETERS, GRADIENTS, OPTIMIZER, COPIES, BUCKETS, LOGITS, REST)
"""In the order of the table."""
