"""Names that job scripts from before 0.2 call; their modules are in `supervise` and `slurm` now. Removed in 0.3."""
