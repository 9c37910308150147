"""What is not training but needs torch, in a process of its own: `python -m trainer.worker.start VERB ARGUMENT...`.

VERB is a module beside this one: evaluate, predict, export or deep. Its `main()` finds the arguments in `sys.argv[1:]`.
"""

from __future__ import annotations

import importlib
import sys

from trainer.worker.imports import quick_imports


def main() -> int:
    sys.argv = sys.argv[1:]
    with quick_imports():
        verb = importlib.import_module(f"trainer.worker.{sys.argv[0]}")
    code: int = verb.main()
    return code


if __name__ == "__main__":
    sys.exit(main())
