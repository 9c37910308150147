"""Sweeps: many runs from one command, decided by files that any process may write. See docs/sweeps.md."""
