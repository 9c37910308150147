"""Checkpoints: the commit protocol, the store, the tiers, and the file and sharded formats.

This package stores what it is given. What a checkpoint holds: `train/checkpoint_contents.py`.
"""
