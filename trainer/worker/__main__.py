"""One rank of one attempt: `python -m trainer.worker RUN_DIR`, started by torchrun.

The order matters. SLURM may signal while torch is still being imported, so the handlers stand first; whatever
happens then, also a failed import, must end in this rank's log.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.worker import process, stop
from trainer.worker.imports import quick_imports


def main() -> int:
    stop.install_handlers()
    run_path = Path(sys.argv[1])
    process.die_with_parent()
    process.redirect_output(run_path)
    process.dump_stacks_when_asked(run_path)
    with quick_imports():
        from trainer.worker.run import run

    return run(run_path)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
