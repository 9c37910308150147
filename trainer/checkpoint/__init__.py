"""Checkpoints: the commit protocol, the store, the two tiers, and the file and sharded formats."""
