"""What the fork server leaves out when its forks exit."""

from __future__ import annotations

import subprocess
import sys

FINALIZED = """
import weakref
import torch
from trainer.supervise.fork_server import keep_operators
class Held:
    pass
library, held = torch.library.Library("trainer_of_a_test", "FRAGMENT"), Held()
library.define("doubled(Tensor x) -> Tensor")
weakref.finalize(held, print, "other")
keep_operators()
weakref.finalize._exitfunc()  # as atexit calls it
print("kept" if hasattr(torch.ops.trainer_of_a_test, "doubled") else "lost")
"""


def test_a_fork_that_exits_leaves_the_operators_of_torch_and_runs_other_finalizers() -> None:
    done = subprocess.run([sys.executable, "-c", FINALIZED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["other", "kept"]
