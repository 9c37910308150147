"""Callbacks: what happens during training beside the step itself: saves, metrics, guards, monitoring."""
