"""`python -m trainer.cluster.slurm.preflight` of a job script submitted before 0.2: `trainer.slurm.preflight`."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("trainer.slurm.preflight", run_name="__main__", alter_sys=True)
