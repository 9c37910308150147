"""`python -m trainer.cluster.node` of a job script submitted before 0.2: `trainer.supervise.node`."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("trainer.supervise.node", run_name="__main__", alter_sys=True)
