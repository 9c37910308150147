"""What is not training but needs torch, in a process of its own: `python -m trainer.runtime.start MODULE ARGUMENT...`.

The `main()` of MODULE finds the arguments in `sys.argv[1:]`; torch and Lightning are imported quickly before it.
"""

from __future__ import annotations

import importlib
import sys

from trainer.runtime.failure import reported
from trainer.runtime.imports import quick_imports


def main() -> int:
    sys.argv = sys.argv[1:]
    with quick_imports():
        module = importlib.import_module(sys.argv[0])
    return reported(module.main)


if __name__ == "__main__":
    sys.exit(main())
