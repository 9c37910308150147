"""torchrun as this project starts it: `python trainer/cluster/agent.py`, with torchrun's own arguments.

By file, not by module: the code frozen in a run directory goes before the installed one and may be older than this.
Importing torch and, at the end, taking it apart again is all that torchrun costs: 2.2 s of CPU, and 1.3 s when no
garbage is looked for among what modules define. A job starts that much sooner.
"""

from __future__ import annotations

import gc
import sys


def main() -> None:
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 puts the folder of this file first
        sys.path.pop(0)
    gc.disable()
    from torch.distributed.run import main as torchrun

    gc.freeze()
    gc.enable()
    torchrun()


if __name__ == "__main__":
    main()
