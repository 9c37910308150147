"""Convert a large `metrics.jsonl` in a process of its own, so that the page stays quick: `SOURCE FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from trainer.core.processes import die_with_parent
from trainer.dashboard.curve_file import CurveFile


def main() -> int:
    """Convert the file; the progress is in its cache folder."""
    die_with_parent(signal.SIGKILL, os.getppid())
    os.nice(5)
    source, folder = map(Path, sys.argv[1:])
    CurveFile(source, folder).convert()
    return 0


if __name__ == "__main__":
    sys.exit(main())
