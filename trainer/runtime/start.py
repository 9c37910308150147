"""Run a module that needs torch but does not train: `python -m trainer.runtime.start MODULE ARGUMENT...`.

The `main()` of MODULE has the arguments in `sys.argv[1:]`. torch and Lightning are imported before, by `quick_imports`.
"""

from __future__ import annotations

import importlib
import sys

from trainer.runtime.failure import reported
from trainer.runtime.imports import quick_imports


def main() -> int:
    """Import the module and run its `main`; return the exit code."""
    sys.argv = sys.argv[1:]
    with quick_imports():
        module = importlib.import_module(sys.argv[0])
    return reported(module.main)


if __name__ == "__main__":
    sys.exit(main())
