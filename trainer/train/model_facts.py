"""What `trainer check --deep` asks the process that builds models, `trainer.train.deep`, and what that answers.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.core.errors import Refusal


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A job whose model is to be built; a message is a list of them."""

    config: dict[str, Any]
    """The composed configuration."""
    with_data: bool
    """Whether to prepare the data; otherwise the model is counted as published."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about the model of one job.

    A floating point operation (FLOP) is an addition or a multiplication. Only matrix products, convolutions and
    attention are counted, attention as if no position were masked.
    """

    parameters: int | None = None
    trainable: int | None = None
    forward_flops: int | None = None
    """FLOPs of the forward pass of one sample."""
    training_flops: int | None = None
    """FLOPs of forward and backward pass of one sample, without activation checkpointing."""
    tokens: int | None = None
    """Tokens in a sample; null: it is not a sequence of tokens."""
    at: dict[str, Any] | None = None
    """Arguments that were filled in from the data, or from `trainer.train.deep.PUBLISHED`."""
    not_counted: str | None = None
    """Reason why the FLOPs are not known."""
    error: Refusal | None = None
    """Why the job cannot be built."""
