"""What is not training but needs torch, in a process of its own: `python trainer/worker/start.py VERB ARGUMENT...`.

VERB is a module of `trainer.worker`: evaluate, predict, export or deep. Its `main()` finds the arguments in
`sys.argv[1:]`. By file, not by module: the code frozen in a run directory may be older than this.
"""

from __future__ import annotations

import importlib
import sys


def main() -> int:
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 puts the folder of this file first
        sys.path.pop(0)
    from trainer.worker.imports import quick_imports

    sys.argv = sys.argv[1:]
    with quick_imports():
        verb = importlib.import_module(f"trainer.worker.{sys.argv[0]}")
    try:
        from trainer.worker.failure import reported
    except ImportError:  # the older code
        return int(verb.main())
    return reported(verb.main)


if __name__ == "__main__":
    sys.exit(main())
