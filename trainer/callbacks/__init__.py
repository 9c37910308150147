"""Callbacks: work around the training step: saves, metrics, guards, monitoring."""
