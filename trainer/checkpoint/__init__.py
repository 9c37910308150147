"""Checkpoints: the commit protocol, the store, the tiers, and the file and sharded formats.

This package stores what it is given. What a checkpoint holds is decided in `strategies/saving.py` (model, optimizer),
`callbacks/transient_state.py` and `callbacks/rng.py` (state that Lightning keeps only in memory), and
`train/checkpoint_saver.py` (metadata in COMMIT).
"""
