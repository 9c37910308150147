"""`python -m trainer.cluster.slurm.attempt` of a job script submitted before 0.2: `trainer.slurm.attempt`."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("trainer.slurm.attempt", run_name="__main__", alter_sys=True)
