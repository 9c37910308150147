"""Trainer: one training job from a laptop to a cluster, without changing it."""

__version__ = "0.1.0"
