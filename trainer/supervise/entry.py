"""The modules with which the processes of a run start.

A run that was made in a checkout of this package has frozen the package with the rest of the code, and its processes
import that copy. One from before 0.2 has the modules under other names.
"""

from __future__ import annotations

from pathlib import Path

from trainer.runs.code_snapshot import import_paths

RANK = "trainer.train"
"""`python -m trainer.train RUN_DIR` is one rank."""
PRELOAD = "trainer.train.run"
"""What a rank imports first, and torchrun's process for all ranks."""
EVALUATE, PREDICT, EXPORT, DEEP = (
    "trainer.train.evaluate",
    "trainer.train.predict",
    "trainer.export.run",
    "trainer.train.deep",
)
START = "trainer.runtime.start"
"""`python -m trainer.runtime.start MODULE ARGUMENT...` calls the `main` of MODULE."""
_BEFORE = {
    RANK: "trainer.worker",
    PRELOAD: "trainer.worker.run",
    EVALUATE: "trainer.worker.evaluate",
    PREDICT: "trainer.worker.predict",
    EXPORT: "trainer.worker.export",
}
"""Names up to 0.1."""


def module_of(name: str, code_dir: Path) -> str:
    """`name`, or what the package frozen at `code_dir`, if it is one from before, calls that module."""
    return _BEFORE[name] if _is_frozen_before(code_dir) else name


def started(name: str, code_dir: Path | None = None) -> list[str]:
    """Arguments for Python that call `main` of the module `name`; `code_dir`: with the frozen code of a run."""
    if code_dir is not None and _is_frozen_before(code_dir):
        return ["-m", "trainer.worker.start", _BEFORE[name].rpartition(".")[2]]
    return ["-m", START, name]


def _is_frozen_before(code_dir: Path) -> bool:
    for folder in import_paths(code_dir):
        package = Path(folder) / "trainer"
        if (package / "__init__.py").is_file():
            return (package / "worker" / "__main__.py").is_file()
    return False
